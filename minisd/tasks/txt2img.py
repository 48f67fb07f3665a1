"""A picture from a prompt: prompt → context → noise → sampler(guided U-Net) → VAE → picture."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from minisd.config import Settings
from minisd.tasks.img2img import partial_timesteps
from minisd.tasks.latents import decode_latents, encode_picture
from minisd.tasks.sampling import Noise, Sampling, batches, check_seed, sampler_of

if TYPE_CHECKING:
    from minisd.pipeline import StableDiffusion


def txt2img(
    sd: StableDiffusion,
    prompt: str | Sequence[str],
    *,
    negative_prompt: str | Sequence[str] = "",
    seed: int = 0,
    num_images: int = 1,
    height: int | None = None,
    width: int | None = None,
    variation_seed: int | None = None,
    variation: float = 0.0,
    two_pass: float | None = None,
    latents: Tensor | None = None,
    settings: Settings | None = None,
) -> Iterator[Sampling]:
    """Batches of `settings.batch_size` images, counted over prompts × num_images; image i has the seed `seed + i`.

    height, width: multiples of the VAE's factor, the model's own size when None. variation in [0, 1] turns the noise of
    `seed` towards that of `variation_seed + i`: image i is a variation of the one picture that `seed` is. two_pass: for
    sizes beyond the model's own, draw the composition at its own size first, then redraw it enlarged with this strength
    (0.5 to 0.7); up to its own size there is one pass. latents: x_T 'n c h w' to start from, in place of noise.
    """
    settings = settings or Settings()
    sd.check_plain("txt2img")
    height, width = sd.image_size(height, width)
    first = _first_pass_size(sd, height, width) if two_pass is not None else (height, width)
    shape, sampler, timesteps = sd.latent_shape(*first), sampler_of(settings), sd.timesteps(settings)
    again = partial_timesteps(sd, settings, two_pass) if two_pass is not None else []

    for batch in batches(sd, prompt, negative_prompt, num_images, seed, settings):
        if variation_seed is not None or variation:
            batch = replace(batch, noise=VariedNoise(batch.noise, batch.indices, seed, variation_seed, variation))
        x_T = batch.noise.draw(shape)
        if latents is not None:
            x_T = _given(latents, batch.indices, shape).to(x_T)
        model = sd.guided_model(batch.cond, batch.uncond, settings)
        steps = sampler(model, x_T, sd.schedule, timesteps, noise=batch.noise)
        sampling = Sampling(sd, settings, batch, x_T, timesteps, steps, is_draft=first != (height, width))
        yield sampling

        if sampling.is_draft:
            for _ in sampling:  # the steps that the caller left
                pass
            # never rounded to 8 bits on the way, which would make much of the least difference between batches
            draft = decode_latents(sd.bring(sd.vae), sampling.latents, settings.tile).clamp(-1, 1)
            picture = F.interpolate(draft, (height, width), mode="bicubic")
            x_0 = batch.noise.sample(encode_picture(sd.bring(sd.vae), picture, settings.tile))
            x_t = sd.schedule.q_sample(x_0, again[0], batch.noise(x_0))
            steps = sampler(model, x_t, sd.schedule, again, noise=batch.noise)
            yield Sampling(sd, settings, batch, x_t, again, steps)


class VariedNoise(Noise):
    """Every draw lies on the great circle from that of `seed` (variation 0) to that of variation_seed + i (1)."""

    def __init__(self, own: Noise, indices: Sequence[int], seed: int, variation_seed: int | None, variation: float):
        if variation_seed is None:
            raise ValueError(f"variation is {variation}, but there is no variation_seed to turn towards: give one")
        if not 0 <= variation <= 1:
            raise ValueError(
                f"variation is {variation}: it lies in [0, 1], from the seed's picture to the variation seed's"
            )
        check_seed("variation_seed", variation_seed, max(indices) + 1)
        self.variation = variation
        self.origin = Noise([seed] * len(indices), own.device)
        self.other = Noise([variation_seed + i for i in indices], own.device)

    def draw(self, shape: Sequence[int]) -> Tensor:
        return slerp(self.origin.draw(shape), self.other.draw(shape), self.variation)


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


def _given(latents: Tensor, indices: list[int], shape: tuple[int, ...]) -> Tensor:
    """The rows of x_T that a batch starts from."""
    if tuple(latents.shape[1:]) != shape or len(latents) <= max(indices):
        raise ValueError(
            f"latents have the shape {tuple(latents.shape)}: this call needs {(max(indices) + 1, *shape)} or more rows"
        )
    return latents[indices]


def _first_pass_size(sd: StableDiffusion, height: int, width: int) -> tuple[int, int]:
    """About the area that the model was trained at, in the proportions asked for; never larger than what was asked."""
    side, multiple = sd.config.image_size, sd.config.vae.factor * sd.config.unet.factor
    shrink = side / math.sqrt(height * width)
    if shrink >= 1:
        return height, width
    return tuple(min(length, max(multiple, round(shrink * length / multiple) * multiple)) for length in (height, width))
