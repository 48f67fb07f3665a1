"""Repaint part of a picture, or paint on beyond its edges; what is not to be painted stays as it was, bit for bit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from minisd.config import Settings
from minisd.images import composite, inward_feather, pad_to_multiple, to_mask, to_tensor, to_uint8
from minisd.tasks.img2img import partial_timesteps
from minisd.tasks.sampling import Noise, Sampling, batches, encode_pairs

if TYPE_CHECKING:
    from minisd.pipeline import StableDiffusion


def inpaint(
    sd: StableDiffusion,
    prompt: str | Sequence[str],
    image: Image.Image,
    mask: Image.Image,
    *,
    strength: float = 1.0,
    exact_steps: bool = False,
    feather: int = 8,
    negative_prompt: str | Sequence[str] = "",
    seed: int = 0,
    num_images: int = 1,
    settings: Settings | None = None,
) -> Iterator[Sampling]:
    """Repaint `image` where `mask` is white; everything else is given back bit for bit.

    With a 9-channel inpainting model the network sees the mask and the picture without the masked part. With an
    ordinary model the known latents are noised and put back after every step (Lugmayr et al. 2022, eq. 8, without their
    resampling). The painted pixels are blended in over `feather` pixels inside the mask. strength < 1 keeps traces of
    what was under the mask.
    """
    picture = to_tensor(image)
    hole = to_mask(mask, tuple(picture.shape[-2:]))
    if not hole.any():
        raise ValueError("the mask has no white part: there is nothing to repaint")
    yield from _repaint(
        sd, prompt, picture, hole, strength, exact_steps, feather, negative_prompt, seed, num_images, settings
    )


def outpaint(
    sd: StableDiffusion,
    prompt: str | Sequence[str],
    image: Image.Image,
    *,
    left: int = 0,
    right: int = 0,
    top: int = 0,
    bottom: int = 0,
    feather: int = 8,
    negative_prompt: str | Sequence[str] = "",
    seed: int = 0,
    num_images: int = 1,
    settings: Settings | None = None,
) -> Iterator[Sampling]:
    """Paint on beyond the edges: the picture stays, bit for bit, in a frame of so many new pixels at each side."""
    if min(left, right, top, bottom) < 0 or left + right + top + bottom == 0:
        raise ValueError(f"left={left} right={right} top={top} bottom={bottom}: give new pixels for at least one side")
    picture = F.pad(to_tensor(image), (left, right, top, bottom), mode="replicate")
    hole = torch.ones(1, 1, *picture.shape[-2:], dtype=torch.bool)
    hole[..., top : picture.shape[-2] - bottom, left : picture.shape[-1] - right] = False
    yield from _repaint(sd, prompt, picture, hole, 1.0, False, feather, negative_prompt, seed, num_images, settings)


def _repaint(
    sd: StableDiffusion,
    prompt,
    picture: Tensor,
    hole: Tensor,
    strength: float,
    exact_steps: bool,
    feather: int,
    negative_prompt,
    seed: int,
    num_images: int,
    settings: Settings | None,
) -> Iterator[Sampling]:
    """picture '1 3 h w' in [-1, 1], hole '1 1 h w' bool."""
    settings = settings or Settings()
    inpainting_model = sd.config.unet.in_channels == 2 * sd.config.vae.latent_channels + 1
    if not inpainting_model:
        sd.check_plain("inpaint")
    factor, size = sd.config.vae.factor, picture.shape[-2:]
    original, weight = to_uint8(picture), inward_feather(hole, feather)
    picture, hole = pad_to_multiple(picture, factor), pad_to_multiple(hole, factor)
    timesteps = partial_timesteps(sd, settings, strength, exact_steps)

    def finish(images: Tensor) -> Tensor:
        return composite(original, to_uint8(images.cpu())[..., : size[0], : size[1]], weight)

    for batch in batches(prompt, negative_prompt, num_images, seed, settings.batch_size):
        cond, uncond = encode_pairs(sd, batch, settings)
        noise = Noise(batch.seeds, sd.device)
        pictures = picture.expand(len(batch.seeds), -1, -1, -1)
        latents = sd.encode_image(pictures, noise, settings)
        start = noise.draw(latents.shape[1:])
        known = sd.schedule.q_sample(latents, timesteps[0], start)
        x_t = start if strength == 1 else known
        blend = None
        if inpainting_model:
            masked = sd.encode_image(torch.where(hole, 0.0, pictures), noise, settings)  # 0 is grey, as in training
            channel = F.interpolate(hole.float(), masked.shape[-2:]).to(masked).expand(len(masked), -1, -1, -1)
            concat = torch.cat([channel, masked], dim=1).to(sd.dtype)
            cond, uncond = (c and replace(c, concat=concat) for c in (cond, uncond))
        else:
            # a latent is kept where not one of its pixels is to be painted
            keep = (F.max_pool2d(hole.float(), factor) == 0).to(sd.device)
            x_t = torch.where(keep, known, x_t)

            def blend(step, latents=latents, start=start, keep=keep) -> None:
                known = latents if step.t_prev is None else sd.schedule.q_sample(latents, step.t_prev, start)
                step.x.copy_(torch.where(keep, known, step.x))

        yield Sampling(sd, batch, cond, uncond, x_t, timesteps, settings, noise, blend=blend, finish=finish)
