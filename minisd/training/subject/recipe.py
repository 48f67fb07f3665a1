"""What DreamBooth, Textual Inversion and LoRA share: a few photos of one subject, and the loss by which it is learnt.

The three differ in what they let move: the whole U-Net, a row of the token embedding, low-rank additions to layers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from minisd.checkpoints.digests import network_digest
from minisd.checkpoints.files import open_tensors, save_safetensors
from minisd.diffusion.gaussian import per_image
from minisd.diffusion.schedule import Schedule
from minisd.files import write_whole
from minisd.models.latents import encode_image
from minisd.models.unet import Conditioning
from minisd.models.vae import VAE
from minisd.runtime.allocator import forget_file_pages
from minisd.stable_diffusion import StableDiffusion
from minisd.tasks.images import grid
from minisd.training.draws import Draws
from minisd.training.loop import train
from minisd.training.loss import min_snr_weights
from minisd.training.options import Run
from minisd.training.parallel import Processes
from minisd.training.progress import draw_curves, read_log
from minisd.training.state import learnt_weights, take_weights
from minisd.training.subject.photos import Photos, Views
from minisd.training.weights import recompute

BEST = "best.safetensors"


@dataclass(frozen=True)
class Validation:
    """What is drawn, and scored where scores are given, while a subject is learnt. Nothing here changes a step.

    Attributes:
        prompts: {} stands for the subject.
        seeds: pictures of each prompt, always of the same seeds.
        steps: of the sampler.
        guidance_scale: how much the prompt counts.
        best: end with the weights of the best scores, not with the last.
    """

    prompts: tuple[str, ...] = ("a {}", "a {} in the snow", "a red {}", "a drawing of a {}")
    seeds: int = 2
    steps: int = 25
    guidance_scale: float = 7.5
    best: bool = True

    def __post_init__(self):
        if not self.prompts or self.seeds < 1 or self.steps < 1:
            raise ValueError(
                f"validation: {len(self.prompts)} prompts, {self.seeds} seeds, {self.steps} steps: 1 of each at least "
                "(--sample-every 0 draws at the end alone)"
            )


@dataclass(frozen=True)
class SubjectConfig:
    """The subject in words, and what its photos are to the loss.

    Attributes:
        token: the word that shall mean the subject: a rare one of CLIP's, or a placeholder for Textual Inversion.
        class_word: what the subject is one of, such as dog.
        prompts: what is said of a photo; {} is the subject. A photo's captions are added to each of
            them; or taken as they are where they name the token, or hold {} themselves.
        views: how photos are cropped and mirrored.
        background: the weight of the error outside masks, 1 inside; for photos with masks.
        min_snr: γ of min-SNR weighting (the paper's is 5); null weighs all times alike.
        recompute: gradient checkpointing: a third more work, much less memory.
        validation: what is drawn on the way.
    """

    token: str
    class_word: str
    prompts: tuple[str, ...] = ("a {}",)
    views: Views = field(default_factory=Views)
    background: float = 0.0
    min_snr: float | None = None
    recompute: bool = False
    validation: Validation = field(default_factory=Validation)

    def __post_init__(self):
        if not self.token.strip() or not self.class_word.strip():
            raise ValueError(f"token {self.token!r}, class {self.class_word!r}: give a word for each")
        for prompt in (*self.prompts, *self.validation.prompts):
            if prompt.count("{}") != 1:
                raise ValueError(f"the prompt {prompt!r} needs one {{}}, where the subject stands")
        if not self.prompts:
            raise ValueError('there is no prompt to show the photos with: give one, such as "a {}"')
        if not 0 <= self.background <= 1:
            raise ValueError(f"background {self.background} is a weight in [0, 1]")

    @property
    def phrase(self) -> str:
        """What DreamBooth calls the subject: a sks dog is a dog, only this one."""
        return f"{self.token} {self.class_word}"


@dataclass(frozen=True, eq=False)
class Examples:
    """Photos as the loss sees them, computed once.

    mean, std: of the latents of each view, 'n v c h w'. weight: of a latent's error, 'n v 1 h w', 1 on average. prompt:
    rows of the recipe's table of prompts, 'k'; photo i has the `count[i]` from `first[i]` on.
    """

    mean: Tensor
    std: Tensor
    weight: Tensor
    prompt: Tensor
    first: Tensor
    count: Tensor

    def __len__(self) -> int:
        return len(self.mean)

    def draw(self, rows: Tensor, schedule: Schedule, draws: Draws) -> Batch:
        """One view and one prompt of each of these photos, noise and a time."""
        view = (draws.uniform() * self.mean.shape[1]).long()
        way = (draws.uniform() * self.count[rows]).long()
        mean, std = self.mean[rows, view], self.std[rows, view]
        x_0 = mean + std * draws.normal(*mean.shape[1:]).to(mean)
        noise = draws.normal(*mean.shape[1:]).to(mean)
        t = draws.integers(schedule.num_timesteps)
        return Batch(x_0, noise, t, self.prompt[self.first[rows] + way], self.weight[rows, view])


@dataclass(frozen=True, eq=False)
class Batch:
    """What one step is about: latents x_0 and noise 'b c h w', t 'b', prompt 'b' (rows of the table), weight 'b 1 h w'.

    With prior preservation the photos of the subject come first, then as many of the class.
    """

    x_0: Tensor
    noise: Tensor
    t: Tensor
    prompt: Tensor
    weight: Tensor

    @classmethod
    def cat(cls, parts: Sequence[Batch]) -> Batch:
        return cls(*(torch.cat([getattr(part, f.name) for part in parts]) for f in fields(cls)))


class SubjectRecipe:
    """E‖target - unet(x_t, t, prompt)‖² over the subject, and λ times the same over its class; the target is ε or v.

    The second term is DreamBooth's prior preservation (Ruiz et al. 2023, eq. 2): without it the class becomes the
    subject. sd: the model that learns; what of its U-Net and text encoder has requires_grad moves. phrase: what the
    prompts call the subject. class_photos: of the prior; None for no such term. folder: where the scores are kept.
    """

    def __init__(
        self,
        name: str,
        sd: StableDiffusion,
        config: SubjectConfig,
        photos: Photos,
        folder: Path,
        *,
        phrase: str,
        precision: str,
        class_photos: Photos | None = None,
        prior_weight: float = 1.0,
        scores: Scores | None = None,
    ):
        sd.check_task(f"{name} training", "text-to-image")
        self.name, self.sd, self.config, self.folder, self.scores = name, sd, config, folder, scores
        self.phrase, self.precision, self.prior_weight = phrase, precision, prior_weight
        self.networks = nn.ModuleDict({"unet": sd.unet, "text": sd.text_encoder})
        if config.recompute:
            recompute(sd.unet.slots())
            recompute(sd.text_encoder.blocks)
        self.class_digest = class_photos and class_photos.digest
        said = [prompts_of(captions, config.prompts, phrase, config.token) for captions in photos.captions]
        of_class = [filled(prompt, config.class_word) for prompt in config.prompts]
        self.prompts = list(dict.fromkeys([*chain(*said), *(of_class if class_photos else ())]))
        dtype, device = torch.promote_types(sd.dtype, torch.float32), sd.device
        self.ids = sd.tokenizer(self.prompts).to(device)

        def examples(photos: Photos, said: Sequence[Sequence[str]], cache: str) -> Examples:
            latents = load_latents(photos, sd.vae, folder / cache)
            mean, std, mask = (tensor.to(device, dtype) for tensor in latents)
            weight = config.background + (1 - config.background) * mask
            weight = weight / weight.mean((2, 3, 4), keepdim=True).clamp(min=1e-6)  # of a view without the subject: 0
            prompt = torch.tensor([self.prompts.index(text) for texts in said for text in texts], device=device)
            count = torch.tensor([len(texts) for texts in said], device=device)
            return Examples(mean, std, weight, prompt, count.cumsum(0) - count, count)

        self.photos = examples(photos, said, "photos.safetensors")
        self.prior = class_photos and examples(class_photos, [of_class] * len(class_photos), "class.safetensors")
        self.states = None
        if not learnt_weights(sd.text_encoder):
            with torch.no_grad(), self._autocast():
                self.states = torch.cat([sd.text_encoder(ids) for ids in self.ids.split(16)]).to(dtype)
            for weight in sd.text_encoder.parameters():
                forget_file_pages(weight)  # it is not asked again but for sheets

    def __len__(self) -> int:
        return len(self.photos)

    def batch(self, examples: Tensor, draws: Draws) -> Batch:
        """The photos of these rows, and as many of the class, any of them."""
        parts = [self.photos.draw(examples.to(draws.device), self.sd.schedule, draws)]
        if self.prior is not None:
            rows = (draws.uniform() * len(self.prior)).long()
            parts.append(self.prior.draw(rows, self.sd.schedule, draws))
        return Batch.cat(parts)

    def loss(self, examples: Tensor, draws: Draws) -> dict[str, Tensor]:
        return self.losses(self.batch(examples, draws))

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        errors = self.errors(batch)
        if self.prior is None:
            return {"loss": errors.mean()}
        subject, prior = (part.mean() for part in errors.chunk(2))
        return {"loss": subject + self.prior_weight * prior, "subject": subject, "prior": prior}

    def errors(self, batch: Batch) -> Tensor:
        """The weighted square error of each latent, 'b'."""
        schedule, prediction = self.sd.schedule, self.sd.config.prediction
        x_0, noise, t = batch.x_0, batch.noise, batch.t
        context = self.sd.text_encoder(self.ids[batch.prompt]) if self.states is None else self.states[batch.prompt]
        x_t = schedule.q_sample(x_0, t, noise)
        target = {"eps": noise, "v": schedule.v_target(x_0, t, noise), "x_0": x_0}[prediction]
        output = self.sd.unet(x_t, t, Conditioning(context)).to(x_0.dtype)
        weights = min_snr_weights(schedule, t, self.config.min_snr, prediction).to(output)
        return weights * per_image(batch.weight * (output - target) ** 2)

    # ------------------------------------------------------------------------------------------ what is seen of it

    @torch.no_grad()
    def sheet(self, step: int) -> Image.Image:
        """The validation prompts, a row each, drawn by the code that draws every picture, and scored."""
        validation, seeds = self.config.validation, self.config.validation.seeds
        images = self._drawn(self.phrase)
        if self.scores is not None:
            # to the judge the token says nothing: the class word stands in its place
            prompts = [filled(p, self.config.class_word) for p in validation.prompts for _ in range(seeds)]
            found = self.scores(images, prompts, class_images=self._drawn(self.config.class_word))
            self._keep(step, found)
        return grid(images, columns=seeds)

    def _drawn(self, phrase: str) -> list[Image.Image]:
        validation = self.config.validation
        prompts = [filled(prompt, phrase) for prompt in validation.prompts]
        with self._autocast():
            return self.sd.txt2img(
                prompts,
                num_images=validation.seeds,
                steps=validation.steps,
                guidance_scale=validation.guidance_scale,
                batch_size=validation.seeds,
            )

    def _autocast(self) -> torch.autocast:
        """What the loop puts round the loss, for all else that runs the networks."""
        return torch.autocast(self.sd.device.type, torch.bfloat16, enabled=self.precision == "bfloat16")

    def _keep(self, step: int, scores: dict[str, float]) -> None:
        """One more point of the curves in scores.jsonl and scores.png; the weights of the best one are kept."""
        path = self.folder / "scores.jsonl"
        before = [line for line in read_log(path) if line["step"] < step]  # a resumed training comes here again
        lines = [*before, {"step": step, **scores}]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        write_whole(path, lambda file: file.write(text.encode()))
        draw_curves(lines, self.folder / "scores.png")
        if self.config.validation.best and best_step(lines) == step:
            save_safetensors(self.folder / BEST, learnt_weights(self.networks), {"step": str(step)})

    def take_best(self) -> None:
        """Go back to the weights of the best scores, if there were any."""
        if self.config.validation.best and (self.folder / BEST).exists():
            file = open_tensors(self.folder / BEST)
            take_weights(self.networks, {name: file.read(name) for name in file}, self.folder / BEST)


class Scores(Protocol):
    """Numbers by name from pictures and their prompts: `eval.subject.SubjectJudge.scores`, or one's own.

    CLIP-I (or DINO) and CLIP-T choose the best weights, see `best_step`.
    """

    def __call__(
        self, images: list[Image.Image], prompts: list[str], *, class_images: list[Image.Image]
    ) -> dict[str, float]: ...


def best_step(lines: Sequence[Mapping[str, float]]) -> int:
    """The step whose geometric mean of fidelity (DINO, else CLIP-I) and prompt-following (CLIP-T) is highest.

    Either alone is best at one end of a training: when nothing is learnt yet, and when nothing else is left. The scale
    of a score is without effect on the order of geometric means.
    """

    def merit(line: Mapping[str, float]) -> float:
        return max(line.get("DINO", line["CLIP-I"]), 0) * max(line["CLIP-T"], 0)

    return max(lines, key=merit)["step"]


def learn(
    recipe: SubjectRecipe, config: Any, base: StableDiffusion, photos: Photos, run: Run, group: Processes
) -> None:
    """Train a recipe to its end; its networks are then frozen and hold the weights that the method's file is made of.

    config: the method's, with the fields `subject` and `loop`. base: the model as it was given.
    """
    if base.device.type != group.device.type:
        raise ValueError(f"the model is on {base.device}, the training runs on {group.device}: load it there")
    same = replace(config, subject=replace(config.subject, recompute=False))  # where memory is saved changes nothing
    settings = {
        "method": recipe.name,
        "recipe": asdict(same),
        "photos": photos.digest,
        "class": recipe.class_digest,
        "base": [network_digest(network) for network in (base.unet, base.text_encoder, base.vae)],
    }
    train(recipe, config.loop, recipe.folder, run, group, settings)
    group.wait()
    recipe.take_best()
    recipe.networks.requires_grad_(False)


def with_networks(sd: StableDiffusion, **networks: nn.Module) -> StableDiffusion:
    """A model of its own with some networks ("unet", "text") in place of sd's; it shares the others.

    ValueError where sd was loaded with offload: networks that learn stay on the device.
    """
    if sd.offload:
        raise ValueError("a model that was loaded with offload only draws: load it without, to train it")
    return StableDiffusion.of(replace(sd.checkpoint, networks=sd.networks | networks))


def filled(prompt: str, phrase: str) -> str:
    """The prompt with the phrase where {} stands."""
    return prompt.replace("{}", phrase)


def prompts_of(captions: Sequence[str], prompts: Sequence[str], phrase: str, token: str) -> list[str]:
    """What is said of a photo: the prompts; with captions, each caption after each prompt.

    A caption that names the token, or holds {} for the subject, is taken as it is.
    """
    if not captions:
        return [filled(prompt, phrase) for prompt in prompts]
    whole = [filled(caption, phrase) for caption in captions]
    found = []
    for caption in whole:
        named = names(caption, token)
        found += [caption] if named else [f"{filled(prompt, phrase)}, {caption}" for prompt in prompts]
    return found


def names(caption: str, token: str) -> bool:
    """Whether the token stands in a caption as a word of its own; "asks" does not name "sks"."""
    return re.search(rf"(?<!\w){re.escape(token)}(?!\w)", caption, re.IGNORECASE) is not None


def load_latents(photos: Photos, vae: VAE, path: Path, *, batch_size: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and deviation of the photos' latents 'n v c h w', and their masks 'n v 1 h w' in [0, 1]; kept in a file."""
    digest = f"{photos.digest} {network_digest(vae)}"
    if path.exists() and (file := open_tensors(path)).metadata.get("digest") == digest:
        return tuple(file.read(name) for name in ("mean", "std", "mask"))
    n, views = photos.pixels.shape[:2]
    images = rearrange(torch.from_numpy(photos.pixels), "n v h w c -> (n v) c h w")
    starts = tqdm(range(0, n * views, batch_size), "latents", unit="batch", disable=n * views <= 4 * batch_size)
    device = vae.quant_conv.weight.device
    gaussians = [encode_image(vae, images[i : i + batch_size].to(device).float() / 127.5 - 1) for i in starts]
    mean, std = (torch.cat([getattr(g, name).cpu() for g in gaussians]) for name in ("mean", "std"))
    mask = torch.ones(n * views, 1, *mean.shape[2:])
    if photos.masks is not None:
        mask = rearrange(torch.from_numpy(photos.masks), "n v h w -> (n v) 1 h w").float()
        mask = F.interpolate(mask, size=mean.shape[2:], mode="area")
    # contiguous, as they come back from the file: a convolution rounds otherwise where memory is laid out otherwise
    found = tuple(rearrange(x, "(n v) c h w -> n v c h w", v=views).contiguous() for x in (mean, std, mask))
    path.parent.mkdir(parents=True, exist_ok=True)
    save_safetensors(path, dict(zip(("mean", "std", "mask"), found, strict=True)), {"digest": digest})
    return found
