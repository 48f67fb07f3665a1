"""Recipe: the U-Net that denoises latents under a caption (Rombach et al. 2022, section 3.3)."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from minisd.checkpoints.digests import network_digest
from minisd.checkpoints.files import open_tensors, save_safetensors
from minisd.config import CLIPTextConfig, ModelConfig
from minisd.diffusion.gaussian import per_image
from minisd.models.clip import CLIPText
from minisd.models.unet import Conditioning, UNet
from minisd.models.vae import VAE
from minisd.pipeline import build_schedule
from minisd.stable_diffusion import StableDiffusion
from minisd.tasks.images import grid
from minisd.text.tokenizer import Tokenizer
from minisd.training.data import Pictures
from minisd.training.draws import Draws
from minisd.training.loop import train
from minisd.training.loss import min_snr_weights
from minisd.training.options import RUN, LoopConfig, TrainingRun
from minisd.training.parallel import ALONE, Processes
from minisd.training.weights import checkpoint_gradients, seeded

CACHE = "cache.safetensors"


@dataclass(frozen=True)
class LatentDiffusionConfig:
    """The U-Net and how it learns.

    Attributes:
        model: the whole model; its VAE and text encoder are frozen.
        loop: the training loop.
        caption_dropout: share of images trained with the empty caption, which classifier-free guidance needs.
        min_snr: γ of min-SNR loss weighting (the paper's is 5); null weighs all times alike.
        gradient_checkpointing: a third more computation, much less memory; results are the same.
        prompts: of the sample sheets; none are drawn when empty.
        guidance_scale: classifier-free guidance (CFG) scale of the sample sheets.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)
    caption_dropout: float = 0.1
    min_snr: float | None = None
    gradient_checkpointing: bool = False
    prompts: tuple[str, ...] = ("a red apple", "a cat", "a dog", "a house", "a rocket", "a flower", "a fish", "a heart")
    guidance_scale: float = 4.0

    def __post_init__(self):
        if not 0 <= self.caption_dropout <= 1:
            raise ValueError(f"caption_dropout {self.caption_dropout} is a share: it lies in [0, 1]")
        if self.model.schedule.zero_terminal_snr and self.model.prediction == "eps":
            raise ValueError("zero terminal SNR leaves ε nothing to say at the last time: set prediction to v")


@dataclass(frozen=True, eq=False)
class Cache:
    """What the VAE makes of a data set, computed once, and its captions' tokens.

    mean, std: of the U-Net latents, 'n c h w'. ids: of all captions, int32 'k l'; picture i has the `count[i]` captions
    from `first[i]` on. empty: of the empty caption, 'l'. visited: the pictures of one pass, 'v'.
    """

    mean: Tensor
    std: Tensor
    ids: Tensor
    empty: Tensor
    first: Tensor
    count: Tensor
    visited: Tensor

    def to(self, device: torch.device) -> Cache:
        return Cache(**{name: tensor.to(device) for name, tensor in vars(self).items()})


class LatentDiffusionRecipe:
    """E‖target - unet(x_t, t, caption)‖², t uniform; the target is ε or v (Ho et al. 2020, eq. 14)."""

    name = "unet"

    def __init__(self, vae: VAE, text: CLIPText, cache: Cache, config: LatentDiffusionConfig):
        self.vae, self.text, self.cache, self.config = vae, text, cache, config
        self.schedule = build_schedule(config.model.schedule)
        with seeded("unet", config.loop.seed):
            self.unet = UNet(config.model.unet)
        if config.gradient_checkpointing:
            checkpoint_gradients(self.unet.slots())
        self.networks = nn.ModuleDict({"unet": self.unet})

    def __len__(self) -> int:
        return len(self.cache.visited)

    def loss(self, examples: Tensor, draws: Draws) -> dict[str, Tensor]:
        cache, schedule, prediction = self.cache, self.schedule, self.config.model.prediction
        rows = cache.visited[examples.to(draws.device)]
        mean, std = cache.mean[rows], cache.std[rows]
        way = (draws.uniform() * cache.count[rows]).long()
        dropped = draws.uniform() < self.config.caption_dropout
        context = self.states(torch.where(dropped[:, None], cache.empty, cache.ids[cache.first[rows] + way]))
        t = draws.integers(schedule.num_timesteps)

        x_0 = mean + std * draws.normal(*mean.shape[1:])
        noise = draws.normal(*mean.shape[1:])
        x_t = schedule.q_sample(x_0, t, noise)
        target = schedule.target(x_0, t, noise, prediction)
        output = self.unet(x_t, t, Conditioning(context)).float()

        error = per_image((output - target) ** 2)
        weights = min_snr_weights(schedule, t, self.config.min_snr, prediction).to(error.device)
        return {"loss": (weights * error).mean(), "mse": error.mean()}

    @torch.no_grad()
    def states(self, ids: Tensor) -> Tensor:
        """Of the frozen text encoder, 'b l d': a few hundredths of a step's work, where all captions' would fill
        gigabytes. In float32, as when a picture is drawn.
        """
        with torch.autocast(ids.device.type, enabled=False):
            return self.text(ids.long())

    def sheet(self, step: int) -> Image.Image | None:
        """The prompts of the config, drawn with the model as it is, by the code that draws every picture."""
        if not self.config.prompts:
            return None
        sd = StableDiffusion(self.unet, self.vae, self.text, config=self.config.model)
        scale = self.config.guidance_scale
        images = sd.txt2img(list(self.config.prompts), steps=20, guidance_scale=scale, batch_size=8)
        return grid(images, columns=4)


def train_latent_diffusion(
    pictures: Pictures,
    vae: VAE,
    text: CLIPText,
    folder: str | os.PathLike,
    config: LatentDiffusionConfig,
    run: TrainingRun = RUN,
    group: Processes = ALONE,
    *,
    start: UNet | None = None,
) -> UNet:
    """The trained U-Net, averaged, on the run's device. vae and text are moved there, too.

    start: whose weights it begins with, in place of random ones. ValueError where the config describes another.
    """
    pictures.check_captions()
    if vae.config != config.model.vae or text.config != config.model.text:
        raise ValueError("the config describes another VAE or text encoder than these: replace(model, vae=vae.config)")
    if start is not None and start.config != config.model.unet:
        raise ValueError(f"the U-Net to start from is another: {start.config}; the plan's: {config.model.unet}")
    folder = Path(folder)
    digest = _digest(vae, text, pictures)
    cache = load_cache(folder / CACHE, digest)
    if cache is None:
        cache = build_cache(pictures, vae.to(group.device), text.config, group)
        if group.is_first:
            save_cache(folder / CACHE, cache, digest)
    recipe = LatentDiffusionRecipe(vae.to(group.device), text.to(group.device), cache.to(group.device), config)
    # where memory is saved is no part of the result, nor, at a constant rate, when the training is to end
    settings = {"recipe": asdict(replace(config, gradient_checkpointing=False)), "data": digest}
    if config.loop.is_open_ended:
        settings["recipe"]["loop"]["steps"] = None
    if start is not None:
        recipe.unet.load_state_dict(start.state_dict())
        settings["start"] = network_digest(start)
    train(recipe, config.loop, folder, run, group, settings)
    return recipe.unet.requires_grad_(False)


@torch.no_grad()
def build_cache(
    pictures: Pictures, vae: VAE, text: CLIPTextConfig, group: Processes = ALONE, *, batch_size: int = 32
) -> Cache:
    """Latents and tokens of a data set; the processes share the work, and all get the whole."""
    device = next(vae.parameters()).device
    shape = (len(pictures), vae.config.latent_channels, *[pictures.size // vae.config.factor] * 2)
    mean, std = torch.zeros(shape), torch.zeros(shape)
    for rows in torch.arange(len(pictures))[group.rank :: group.count].split(batch_size):
        gaussian = vae.encode(pictures.images(rows, device))
        mean[rows], std[rows] = gaussian.mean.float().cpu(), gaussian.std.float().cpu()
    tensors = [mean.to(device), std.to(device)]
    group.sum_(tensors)  # of the others' rows each has zeros

    tokenizer = Tokenizer(length=text.length, pad_id=text.pad_id, dialect=text.dialect)
    count = torch.tensor([len(texts) for texts in pictures.captions])
    return Cache(
        mean=tensors[0].cpu(),
        std=tensors[1].cpu(),
        ids=tokenizer([words for texts in pictures.captions for words in texts]).int(),
        empty=tokenizer([""])[0].int(),
        first=count.cumsum(0) - count,
        count=count,
        visited=pictures.visited,
    )


def save_cache(path: Path, cache: Cache, digest: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_safetensors(path, vars(cache), {"digest": digest})


def load_cache(path: Path, digest: str) -> Cache | None:
    """The cache in a file, if there is one and it is of these networks and pictures."""
    if not path.exists():
        return None
    file = open_tensors(path)
    if file.metadata.get("digest") != digest:
        return None
    return Cache(**{name: file.read(name) for name in file})


def _digest(vae: VAE, text: CLIPText, pictures: Pictures) -> str:
    """Of everything that a cache is made from."""
    made_from = [asdict(vae.config), asdict(text.config), network_digest(vae), network_digest(text), pictures.digest]
    return hashlib.sha256(json.dumps(made_from).encode()).hexdigest()[:16]
