"""A picture from a prompt: prompt → context → noise → sampler(guided U-Net) → VAE → picture."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from minisd.config import Settings
from minisd.images import to_tensor
from minisd.tasks.img2img import start_from
from minisd.tasks.sampling import Noise, Sampling, batches, encode_pairs

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
    (0.5 to 0.7). latents: x_T 'n c h w' to start from, in place of noise from the seeds.
    """
    settings = settings or Settings()
    sd.check_plain("txt2img")
    height, width = sd.image_size(height, width)
    first = _first_pass_size(sd, height, width) if two_pass is not None else (height, width)
    timesteps = sd.timesteps(settings)
    for batch in batches(prompt, negative_prompt, num_images, seed, settings.batch_size):
        cond, uncond = encode_pairs(sd, batch, settings)
        noise = Noise(batch.seeds, sd.device)
        if variation_seed is not None:
            noise = Noise([variation_seed + i for i in batch.indices], sd.device)
        x_T = noise.draw(sd.latent_shape(*first))
        if variation_seed is not None:
            origin = Noise([seed] * len(batch.seeds), sd.device).draw(x_T.shape[1:])
            x_T = slerp(origin, x_T, variation)
        if latents is not None:
            x_T = latents[batch.indices].to(sd.device, torch.float32)

        sampling = Sampling(sd, batch, cond, uncond, x_T, timesteps, settings, noise)
        if first == (height, width):
            yield sampling
            continue
        sampling.is_draft = True
        yield sampling
        image = torch.cat([to_tensor(draft, (height, width)) for draft in sampling.images()])
        x_t, rest, _ = start_from(sd, image, timesteps, settings, two_pass, noise)
        yield Sampling(sd, batch, cond, uncond, x_t, rest, settings, noise)


def slerp(a: Tensor, b: Tensor, share: float) -> Tensor:
    """From a (share 0) to b (share 1) along the great circle, image by image: the way between two noises is noise too.

    Shoemake 1985. A straight line would pass through noise of a smaller variance, which the network has never seen.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"variation is {share}: it lies in [0, 1], from the seed's picture to the variation seed's")
    flat_a, flat_b = a.flatten(1).double(), b.flatten(1).double()
    cosine = torch.nn.functional.cosine_similarity(flat_a, flat_b).clamp(-1, 1)
    angle = cosine.acos()[:, None]
    near = angle.sin() < 1e-6  # (anti)parallel: the circle is not defined, the line will do
    weight_a = torch.where(near, 1 - share, ((1 - share) * angle).sin() / angle.sin())
    weight_b = torch.where(near, share, (share * angle).sin() / angle.sin())
    return (weight_a * flat_a + weight_b * flat_b).view_as(a).to(a.dtype)


def _first_pass_size(sd: StableDiffusion, height: int, width: int) -> tuple[int, int]:
    """About the area that the model was trained at, in the proportions asked for; never larger than what was asked."""
    side, factor = sd.config.image_size, sd.config.vae.factor * sd.config.unet.factor
    shrink = min(1.0, side / math.sqrt(height * width))
    if shrink == 1.0:
        return height, width
    return tuple(max(factor, round(shrink * length / factor) * factor) for length in (height, width))
