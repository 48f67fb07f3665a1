"""A picture from a picture: noise it part of the way, and come back along the prompt (SDEdit, Meng et al. 2022)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from PIL import Image
from torch import Tensor

from minisd.config import Settings
from minisd.tasks.images import pad_to_multiple, to_tensor, to_uint8
from minisd.tasks.latents import encode_picture
from minisd.tasks.sampling import Sampling, batches, sampler_of

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

    Of settings.steps only the last ⌊steps·strength⌋ run (`len(sampling)` says how many); with exact_steps all of them
    do, spaced within the last part of the schedule. height, width: resize the picture first, in its own proportions
    where one is given; otherwise a picture of any size is given back in that size.
    """
    settings = settings or Settings()
    sd.check_plain("img2img")
    picture = to_tensor(image, _target(image, height, width))
    height, width = picture.shape[-2:]
    sampler, timesteps = sampler_of(settings), partial_timesteps(sd, settings, strength, exact_steps)
    posterior = encode_picture(sd.bring(sd.vae), pad_to_multiple(picture, sd.config.vae.factor), settings.tile)

    def finish(pictures: Tensor) -> Tensor:
        return to_uint8(pictures[..., :height, :width])

    for batch in batches(sd, prompt, negative_prompt, num_images, seed, settings):
        x_0 = batch.noise.sample(posterior)
        x_t = sd.schedule.q_sample(x_0, timesteps[0], batch.noise(x_0))
        model = sd.guided_model(batch.cond, batch.uncond, settings)
        steps = sampler(model, x_t, sd.schedule, timesteps, noise=batch.noise)
        yield Sampling(sd, settings, batch, x_t, timesteps, steps, finish)


def partial_timesteps(sd: StableDiffusion, settings: Settings, strength: float, exact_steps: bool = False) -> list:
    """The timesteps of a strength s: the last ⌊n·s⌋ of n, or, where exact_steps, n below T·s."""
    if not 0 < strength <= 1:
        raise ValueError(f"strength is {strength}: it lies in (0, 1], from hardly a change to a new picture")
    steps, below = settings.steps, round(sd.schedule.num_timesteps * strength)
    if exact_steps:
        if steps > below:
            raise ValueError(
                f"strength {strength} leaves {below} of the schedule's {sd.schedule.num_timesteps} times, too few for "
                f"exactly {steps} steps: use fewer steps, or a larger strength"
            )
        return sd.timesteps(settings, below)
    count = math.floor(steps * strength + 1e-9)  # the tiny term keeps 0.29 · 100 from being 28
    if count == 0:
        least = math.ceil(1000 / steps) / 1000
        raise ValueError(f"strength {strength} of {steps} steps runs none: use {least} or more, or exact_steps")
    return sd.timesteps(settings)[-count:]


def _target(image: Image.Image, height: int | None, width: int | None) -> tuple[int, int] | None:
    """(height, width) to resize to, in the proportions of the upright picture where only one was given."""
    if height is None and width is None:
        return None
    upright = to_tensor(image).shape[-2:]
    height = round(upright[0] * width / upright[1]) if height is None else height
    width = round(upright[1] * height / upright[0]) if width is None else width
    if height < 1 or width < 1:
        raise ValueError(f"a picture of {height}×{width} (height × width) was asked for: give 1 or more")
    return height, width
