"""What all tasks share: a batch being sampled, the batches of a call, and the noise of each image."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from minisd.diffusion.samplers import Step, get_sampler
from minisd.diffusion.schedule import Time
from minisd.models.nonfinite import nonfinite_error
from minisd.models.unet import Conditioning
from minisd.models.vae import DiagonalGaussian
from minisd.pipeline import CondNetwork, LatentDiffusion
from minisd.tasks.images import to_pil, to_uint8
from minisd.tasks.options import Options, check_seed
from minisd.text.prompts import same_length


@dataclass(eq=False)
class Sampling:
    """One batch on its way from noise to images: iterate to take the steps, then ask for the `images()`.

    latents: x_t as it stands, 'b c h w'. steps: what the sampler yields. finish: the decoded images 'b 3 h w' in
    [-1, 1] → uint8. is_draft: the first pass of hires_fix, for the second to use. len() is the number of steps.
    """

    sd: LatentDiffusion
    options: Options
    batch: Batch
    latents: Tensor
    timesteps: Sequence[Time]
    steps: Iterator[Step]
    finish: Callable[[Tensor], Tensor] = to_uint8
    is_draft: bool = False

    def __post_init__(self) -> None:
        self._checked = self._check()
        self._images: list[Image.Image] | None = None

    def __len__(self) -> int:
        return len(self.timesteps)

    def __iter__(self) -> Iterator[Step]:
        """The steps that have not been taken yet."""
        return self._checked

    @torch.no_grad()
    def _check(self) -> Iterator[Step]:
        for step in self.steps:
            if not step.x.isfinite().all():
                raise nonfinite_error("U-Net", self.sd.unet, partial(self._ask_again, step.t), f"at t = {step.t}")
            self.latents = step.x
            yield step

    def _ask_again(self, t: Time | None) -> None:
        for cond in filter(None, (self.batch.cond, self.batch.uncond)):
            self.sd.unet(self.latents.to(self.sd.dtype), t, cond)

    def images(self) -> list[Image.Image]:
        """The images; takes the steps that are left."""
        if self._images is None:
            self._images = to_pil(pixels := self.finish(self.pixels()))
            for seed, image in zip(self.batch.seeds, pixels, strict=True):
                if image.max() <= 1:
                    warnings.warn(
                        f"the image of seed {seed} is all black: weights of another prediction type (see `minisd "
                        "inspect`) do that, and guidance far too strong",
                        stacklevel=2,
                    )
        return self._images

    def pixels(self) -> Tensor:
        """The images as the VAE gives them, before `finish`: 'b 3 h w' in about [-1, 1], float32.

        Takes the steps that are left, and decodes at every call.
        """
        for _ in self:
            pass
        return self._decode(self.latents)

    def preview(self, step: Step) -> list[Image.Image]:
        """The images that the model predicts at a step, decoded from its x_0."""
        return to_pil(self.finish(self._decode(step.x_0)))

    def _decode(self, latents: Tensor) -> Tensor:
        return self.sd.decode(latents, vae_tiling=self.options.vae_tiling)

    @property
    def seeds(self) -> list[int]:
        return self.batch.seeds


@dataclass(frozen=True)
class Batch:
    """Some images of a call: their places in it, prompts and seeds, and what is made of them.

    uncond is None where guidance is off. noise: of each image from its own generator.
    """

    indices: list[int]
    prompts: list[str]
    negative_prompts: list[str]
    seeds: list[int]
    cond: Conditioning
    uncond: Conditioning | None
    noise: Noise


def denoise(
    sd: LatentDiffusion,
    options: Options,
    batch: Batch,
    x: Tensor,
    timesteps: Sequence[Time],
    network: CondNetwork | None,
) -> Iterator[Step]:
    """The steps of the options' sampler, from x at the first of the timesteps."""
    model = sd.denoiser(
        batch.cond,
        batch.uncond,
        guidance_scale=options.guidance_scale,
        guidance_rescale=options.guidance_rescale,
        guidance_interval=options.guidance_interval,
        network=network,
    )
    sampler = get_sampler(options.sampler, eta=options.eta)
    return sampler(model, x, sd.schedule, timesteps, noise=batch.noise)


def batches(sd: LatentDiffusion, prompt: str | Sequence[str], options: Options) -> Iterator[Batch]:
    """All images of a call, prompts outermost, options.batch_size at a time; image i has the seed `seed + i`."""
    get_sampler(options.sampler, eta=options.eta)  # an unknown one is refused before anything is encoded
    factor = sd.config.vae.factor
    if options.vae_tiling and (options.vae_tiling < 0 or options.vae_tiling % factor):
        raise ValueError(f"vae_tiling is {options.vae_tiling} rows: give a multiple of {factor}, or 0 for no tiling")
    prompts, negatives = _texts(prompt), _texts(options.negative_prompt)
    if isinstance(options.negative_prompt, str):
        negatives *= len(prompts)
    if not prompts:
        raise ValueError("no prompt was given: give a text or a list of texts")
    if len(negatives) != len(prompts):
        raise ValueError(f"{len(negatives)} negative prompts for {len(prompts)} prompts: give one, or one for each")
    count = options.num_images
    total = len(prompts) * count
    check_seed("seed", options.seed, total)

    @cache
    def context_of(text: str) -> Tensor:
        return sd.encode_prompt(text, prompt_syntax=options.prompt_syntax, clip_skip=options.clip_skip).context

    for start in range(0, total, options.batch_size):
        indices = list(range(start, min(start + options.batch_size, total)))
        own, own_negatives = ([texts[i // count] for i in indices] for texts in (prompts, negatives))
        seeds = [options.seed + i for i in indices]
        cond, uncond = _conditions(own, own_negatives if options.guidance_scale != 1 else None, context_of)
        yield Batch(indices, own, own_negatives, seeds, cond, uncond, Noise(seeds, sd.device))


def _texts(text: str | Sequence[str]) -> list[str]:
    texts: list = list(text) if isinstance(text, (list, tuple)) else [text]
    for one in texts:
        if not isinstance(one, str):
            raise ValueError(f"a prompt must be a str, not {type(one).__name__}: {one!r:.80}")
    return texts


def _conditions(
    prompts: list[str], negatives: list[str] | None, context_of: Callable[[str], Tensor]
) -> tuple[Conditioning, Conditioning | None]:
    """(cond, uncond). Every text is encoded by itself, so that no image depends on its neighbours."""
    texts = list(dict.fromkeys(prompts + (negatives or [])))
    contexts = dict(zip(texts, same_length(*map(context_of, texts)), strict=True))

    def joined(some: list[str]) -> Conditioning:
        return Conditioning(torch.cat([contexts[text] for text in some]))

    return joined(prompts), None if negatives is None else joined(negatives)


class Noise:
    """Standard normal noise, of each image from its own generator on the CPU: no image depends on its neighbours.

    Called with a tensor it draws the next noise of its shape, as samplers ask.
    """

    def __init__(self, seeds: Sequence[int], device: torch.device):
        self.generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
        self.device = device

    def draw(self, shape: Sequence[int]) -> Tensor:
        """'b …' float32 for the shape '…' of one image."""
        parts = [torch.randn(tuple(shape), generator=g, dtype=torch.float32) for g in self.generators]
        return torch.stack(parts).to(self.device)

    def sample(self, posterior: DiagonalGaussian) -> Tensor:
        """Latents 'b c h w' of images, or 'b' times of one image."""
        return posterior.mean + posterior.std * self.draw(posterior.mean.shape[1:])

    def __call__(self, x: Tensor) -> Tensor:
        return self.draw(x.shape[1:])


class VariedNoise(Noise):
    """Every draw lies on the great circle from that of `seed` (strength 0) to that of variation_seed + i (1)."""

    def __init__(self, own: Noise, indices: Sequence[int], seed: int, variation_seed: int | None, strength: float):
        if variation_seed is None:
            raise ValueError(
                f"variation_strength is {strength}, but there is no variation_seed to turn towards: give one"
            )
        if not 0 <= strength <= 1:
            raise ValueError(
                f"variation_strength is {strength}: it lies in [0, 1], from the seed's image to the variation seed's"
            )
        check_seed("variation_seed", variation_seed, max(indices) + 1)
        self.strength = strength
        self.origin = Noise([seed] * len(indices), own.device)
        self.other = Noise([variation_seed + i for i in indices], own.device)

    def draw(self, shape: Sequence[int]) -> Tensor:
        return slerp(self.origin.draw(shape), self.other.draw(shape), self.strength)


def slerp(a: Tensor, b: Tensor, share: float) -> Tensor:
    """From a (share 0) to b (share 1) along the great circle, image by image: the way between two noises is noise too.

    Shoemake 1985. A straight line would pass through noise of a smaller variance, which the network has never seen.
    """
    flat_a, flat_b = a.flatten(1).double(), b.flatten(1).double()
    angle = F.cosine_similarity(flat_a, flat_b).clamp(-1, 1).acos()[:, None]
    near = angle.sin() < 1e-6  # (anti)parallel: the circle is not defined, the line will do
    weight_a = torch.where(near, 1 - share, ((1 - share) * angle).sin() / angle.sin())
    weight_b = torch.where(near, share, (share * angle).sin() / angle.sin())
    return (weight_a * flat_a + weight_b * flat_b).view_as(a).to(a.dtype)
