"""What all tasks share: a sampling under way, the batches of a call, and the noise of each image."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from numbers import Integral
from typing import TYPE_CHECKING

import torch
from PIL import Image
from torch import Tensor

from minisd.config import Settings
from minisd.diffusion.samplers import Sampler, Step, get_sampler
from minisd.models.unet import Conditioning
from minisd.models.vae import DiagonalGaussian
from minisd.runtime.tuning import give_back_freed_memory
from minisd.tasks.images import to_pil, to_uint8
from minisd.tasks.latents import decode_latents
from minisd.tasks.nonfinite import nonfinite_error
from minisd.text.prompts import same_length

if TYPE_CHECKING:
    from minisd.pipeline import StableDiffusion


@dataclass(eq=False)
class Sampling:
    """One batch on its way from noise to pictures: iterate to take the steps, then ask for the `images()`.

    latents: x_t as it stands, 'b c h w'. steps: what the sampler yields. finish: the decoded pictures 'b 3 h w' in
    [-1, 1] → uint8. is_draft: a first pass, whose pictures only the second one wants. len() is the number of steps.
    """

    sd: StableDiffusion
    settings: Settings
    batch: Batch
    latents: Tensor
    timesteps: list
    steps: Iterator[Step]
    finish: Callable[[Tensor], Tensor] = to_uint8
    is_draft: bool = False

    def __post_init__(self):
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
                raise nonfinite_error("U-Net", self.sd.unet, lambda t=step.t: self._ask_again(t), f"at t = {step.t}")
            self.latents = step.x
            yield step

    def _ask_again(self, t) -> None:
        for cond in filter(None, (self.batch.cond, self.batch.uncond)):
            self.sd.run_unet(self.latents, t, replace(cond, kv=None))  # the keys' and values' layers run too

    def images(self) -> list[Image.Image]:
        """The pictures; takes the steps that are left."""
        if self._images is None:
            self._images = to_pil(self.finish(self.pixels()))
            for seed, image in zip(self.seeds, self._images, strict=True):
                if max(high for _, high in image.getextrema()) <= 1:
                    warnings.warn(
                        f"the picture of seed {seed} is all black: weights of another prediction type (see `minisd "
                        "inspect`) do that, and guidance far too strong",
                        stacklevel=2,
                    )
        return self._images

    def pixels(self) -> Tensor:
        """The pictures as the VAE gives them, before `finish`: 'b 3 h w' in about [-1, 1], float32.

        Takes the steps that are left, and decodes at every call.
        """
        for _ in self:
            pass
        give_back_freed_memory()  # the U-Net's blocks have other sizes than the VAE's
        return self._decode(self.latents)

    def preview(self, step: Step) -> list[Image.Image]:
        """What the model believes the pictures to be, decoded from a step's x_0."""
        return to_pil(self.finish(self._decode(step.x_0)))

    def _decode(self, latents: Tensor) -> Tensor:
        return decode_latents(self.sd.bring(self.sd.vae), latents, self.settings.tile)

    @property
    def seeds(self) -> list[int]:
        return self.batch.seeds

    @property
    def prompts(self) -> list[str]:
        return self.batch.prompts

    @property
    def negative_prompts(self) -> list[str]:
        return self.batch.negative_prompts


@dataclass(frozen=True)
class Batch:
    """Some images of a call: their places in it, prompts and seeds, and what follows from these.

    uncond is None where guidance is off. noise: of each image from its own generator.
    """

    indices: list[int]
    prompts: list[str]
    negative_prompts: list[str]
    seeds: list[int]
    cond: Conditioning
    uncond: Conditioning | None
    noise: Noise


def batches(
    sd: StableDiffusion,
    prompt: str | Sequence[str],
    negative_prompt: str | Sequence[str],
    num_images: int,
    seed: int,
    settings: Settings,
) -> Iterator[Batch]:
    """All images of a call, prompts outermost, settings.batch_size at a time; image i has the seed `seed + i`."""
    factor = sd.config.vae.factor
    if settings.tile and (settings.tile < 0 or settings.tile % factor):
        raise ValueError(f"tile is {settings.tile} rows: give a multiple of {factor}, or 0 for none")
    prompts, negatives = _texts(prompt), _texts(negative_prompt)
    if isinstance(negative_prompt, str):
        negatives *= len(prompts)
    if not prompts:
        raise ValueError("no prompt was given: give a text or a list of texts")
    if len(negatives) != len(prompts):
        raise ValueError(f"{len(negatives)} negative prompts for {len(prompts)} prompts: give one, or one for each")
    if not isinstance(num_images, Integral) or num_images < 1:
        raise ValueError(f"num_images is {num_images}: give 1 or more")
    total = len(prompts) * num_images
    check_seed("seed", seed, total)
    context_of = cache(lambda text: sd.encode_prompt(text, settings).context)
    for start in range(0, total, settings.batch_size):
        indices = list(range(start, min(start + settings.batch_size, total)))
        own, own_negatives = ([texts[i // num_images] for i in indices] for texts in (prompts, negatives))
        seeds = [seed + i for i in indices]
        cond, uncond = _conditions(sd, own, own_negatives if settings.guidance_scale != 1 else None, context_of)
        yield Batch(indices, own, own_negatives, seeds, cond, uncond, Noise(seeds, sd.device))


def _texts(given: str | Sequence[str]) -> list[str]:
    texts = list(given) if isinstance(given, (list, tuple)) else [given]
    for text in texts:
        if not isinstance(text, str):
            raise ValueError(f"a prompt must be a str, not {type(text).__name__}: {text!r:.80}")
    return texts


def check_seed(name: str, seed: int, count: int) -> None:
    """ValueError unless the generators of `count` images, seeded from `seed` on, exist."""
    last = 2**63 - count
    if not isinstance(seed, Integral) or isinstance(seed, bool) or not 0 <= seed <= last:
        raise ValueError(f"{name} is {seed!r}: give a whole number from 0 to {last}")


@torch.no_grad()
def _conditions(
    sd: StableDiffusion, prompts: list[str], negatives: list[str] | None, context_of: Callable[[str], Tensor]
) -> tuple[Conditioning, Conditioning | None]:
    """(cond, uncond), the keys and values of their contexts computed here, once for all steps.

    Every text is encoded by itself, so that no image depends on its neighbours.
    """
    texts = list(dict.fromkeys(prompts + (negatives or [])))
    contexts = dict(zip(texts, same_length(*map(context_of, texts)), strict=True))

    def joined(some: list[str]) -> Conditioning:
        return sd.bring(sd.unet).with_keys_values(Conditioning(torch.cat([contexts[text] for text in some])))

    return joined(prompts), None if negatives is None else joined(negatives)


class Noise:
    """Standard normal noise, of each image from its own generator on the CPU: no image knows of its neighbours.

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
        """Latents 'b c h w' of pictures, or 'b' times of one picture."""
        return posterior.mean + posterior.std * self.draw(posterior.mean.shape[1:])

    def __call__(self, x: Tensor) -> Tensor:
        return self.draw(x.shape[1:])


def sampler_of(settings: Settings) -> Sampler:
    """The sampler, by name or a function of one's own, with its eta.

    Keywords that only one sampler has are bound by the caller: `Settings(sampler=partial(euler, s_churn=40))`.
    """
    sampler = get_sampler(settings.sampler)
    return partial(sampler, eta=settings.eta) if settings.eta else sampler
