"""A picture from a picture: noise it part of the way, and come back along the prompt (SDEdit, Meng et al. 2022)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from PIL import Image
from torch import Tensor

from minisd.config import Settings
from minisd.images import pad_to_multiple, to_tensor
from minisd.tasks.sampling import Noise, Sampling, batches, encode_pairs

if TYPE_CHECKING:
    from minisd.pipeline import StableDiffusion


def img2img(
    sd: StableDiffusion,
    prompt: str | Sequence[str],
    image: Image.Image,
    *,
    strength: float = 0.75,
    exact_steps: bool = False,
    negative_prompt: str | Sequence[str] = "",
    seed: int = 0,
    num_images: int = 1,
    height: int | None = None,
    width: int | None = None,
    settings: Settings | None = None,
) -> Iterator[Sampling]:
    """Like txt2img, from `image` noised to `strength` in (0, 1]: 0 would keep it, 1 keeps next to nothing of it.

    Of settings.steps only the last ⌊steps·strength⌋ run (`len(sampling)` says how many); exact_steps spaces them so
    that settings.steps run. height, width: resize the picture first; otherwise any size is given back as it came.
    """
    settings = settings or Settings()
    sd.check_plain("img2img")
    picture = to_tensor(image, _target(image, height, width))
    size = picture.shape[-2:]
    timesteps = partial_timesteps(sd, settings, strength, exact_steps)
    for batch in batches(prompt, negative_prompt, num_images, seed, settings.batch_size):
        cond, uncond = encode_pairs(sd, batch, settings)
        noise = Noise(batch.seeds, sd.device)
        padded = pad_to_multiple(picture, sd.config.vae.factor).expand(len(batch.seeds), -1, -1, -1)
        x_t, _ = noised(sd, padded, timesteps, settings, noise)
        yield Sampling(
            sd, batch, cond, uncond, x_t, timesteps, settings, noise, finish=lambda x: x[..., : size[0], : size[1]]
        )


def partial_timesteps(sd: StableDiffusion, settings: Settings, strength: float, exact_steps: bool = False) -> list:
    """The timesteps that a strength leaves of a sampling, the last min(⌊n·s⌋, n) of n."""
    if not 0 < strength <= 1:
        raise ValueError(f"strength is {strength}: it lies in (0, 1], from hardly a change to a new picture")
    steps = settings.steps
    if not exact_steps:
        # the tiny term keeps 0.29 · 100 from being 28
        count = min(math.floor(steps * strength + 1e-9), steps)
        if count == 0:
            raise ValueError(
                f"strength {strength} of {steps} steps runs none: use {1 / steps:.3f} or more, or exact_steps"
            )
        return sd.timesteps(settings)[-count:]
    total = min(max(steps, round(steps / strength)), sd.schedule.num_timesteps)
    return sd.timesteps(replace(settings, steps=total))[-steps:]


def start_from(
    sd: StableDiffusion, image: Tensor, timesteps: list, settings: Settings, strength: float, noise: Noise
) -> tuple[Tensor, list, Tensor]:
    """x_t of a picture 'b 3 h w' at the first of the timesteps that `strength` leaves, those timesteps, and x_0."""
    rest = partial_timesteps(sd, settings, strength)
    x_t, latents = noised(sd, image, rest, settings, noise)
    return x_t, rest, latents


def noised(
    sd: StableDiffusion, image: Tensor, timesteps: list, settings: Settings, noise: Noise
) -> tuple[Tensor, Tensor]:
    """(x_t at timesteps[0], x_0) of a picture; draws first the latents' own noise, then the diffusion's."""
    latents = sd.encode_image(image, noise, settings)
    start = noise.draw(latents.shape[1:])
    return sd.schedule.q_sample(latents, timesteps[0], start), latents


def _target(image: Image.Image, height: int | None, width: int | None) -> tuple[int, int] | None:
    """Resize to what was asked, keeping the proportions where only one side was."""
    if height is None and width is None:
        return None
    height = height or round(image.height * width / image.width)
    width = width or round(image.width * height / image.height)
    if height < 1 or width < 1:
        raise ValueError(f"height {height} and width {width} must be positive")
    return height, width
