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
from minisd.diffusion.samplers import Step
from minisd.diffusion.schedule import Schedule
from minisd.models.vae import DiagonalGaussian
from minisd.tasks.images import composite, inward_feather, pad_to_multiple, to_mask, to_pil, to_tensor, to_uint8
from minisd.tasks.img2img import partial_timesteps
from minisd.tasks.latents import encode_picture
from minisd.tasks.sampling import Batch, Sampling, batches, sampler_of

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
    settings = settings or Settings()
    if not (sees_mask := sd.is_inpainting_model):
        sd.check_plain("inpaint")
    picture = to_tensor(image)
    height, width = picture.shape[-2:]
    hole = to_mask(mask, (height, width))
    if not hole.any():
        raise ValueError("the mask has no white part: there is nothing to repaint")
    original, weight = to_uint8(picture), inward_feather(hole, feather)
    sampler, timesteps = sampler_of(settings), partial_timesteps(sd, settings, strength, exact_steps)
    picture, hole = (pad_to_multiple(x, sd.config.vae.factor) for x in (picture, hole))
    shape = sd.latent_shape(*picture.shape[-2:])
    posterior = masked = None
    if sees_mask:
        grey = torch.where(hole, 0.0, picture)  # as in training
        masked = encode_picture(sd.bring(sd.vae), grey, settings.tile)
    if strength < 1 or not sees_mask:
        posterior = encode_picture(sd.bring(sd.vae), picture, settings.tile)

    def finish(pictures: Tensor) -> Tensor:
        return composite(original, to_uint8(pictures.cpu())[..., :height, :width], weight)

    for batch in batches(sd, prompt, negative_prompt, num_images, seed, settings):
        latents = None if posterior is None else batch.noise.sample(posterior)
        noise = batch.noise.draw(shape)
        x_t = noise if strength == 1 else sd.schedule.q_sample(latents, timesteps[0], noise)
        if sees_mask:
            batch = shown(batch, hole, masked, sd.dtype)
        else:
            keep = kept_latents(hole, sd.config.vae.factor).to(x_t.device)
            x_t = torch.where(keep, sd.schedule.q_sample(latents, timesteps[0], noise), x_t)
        model = sd.guided_model(batch.cond, batch.uncond, settings)
        steps = sampler(model, x_t, sd.schedule, timesteps, noise=batch.noise)
        if not sees_mask:
            steps = blended(steps, latents, noise, keep, sd.schedule)
        yield Sampling(sd, settings, batch, x_t, timesteps, steps, finish)


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
    frame = (left, right, top, bottom)
    picture = to_tensor(image)
    (wider,) = to_pil(F.pad(picture, frame, mode="replicate"))
    (mask,) = to_pil(F.pad(-torch.ones_like(picture), frame, value=1.0))
    yield from inpaint(
        sd,
        prompt,
        wider,
        mask,
        feather=feather,
        negative_prompt=negative_prompt,
        seed=seed,
        num_images=num_images,
        settings=settings,
    )


def shown(batch: Batch, hole: Tensor, masked: DiagonalGaussian, dtype: torch.dtype) -> Batch:
    """The batch, whose network sees after x_t the mask (1 is to be painted) and the latents of the rest, in this order.

    As in training, the mask of a latent is that of its upper left pixel.
    """
    latents = batch.noise.sample(masked)
    channel = F.interpolate(hole.float(), latents.shape[-2:], mode="nearest")
    if not channel.any():
        raise ValueError("the white part of the mask is too thin for this model to see: make it 8 pixels wide or more")
    concat = torch.cat([channel.to(latents).expand(len(latents), -1, -1, -1), latents], dim=1).to(dtype)
    cond, uncond = (c and replace(c, concat=concat) for c in (batch.cond, batch.uncond))
    return replace(batch, cond=cond, uncond=uncond)


def kept_latents(hole: Tensor, factor: int) -> Tensor:
    """'1 1 h w' bool: the latents not one of whose pixels is to be painted."""
    return F.max_pool2d(hole.float(), factor) == 0


def blended(steps: Iterator[Step], latents: Tensor, noise: Tensor, keep: Tensor, schedule: Schedule) -> Iterator[Step]:
    """The steps, each with the known latents put back, noised to its time, before the sampler goes on from it."""
    for step in steps:
        known = latents if step.t_prev is None else schedule.q_sample(latents, step.t_prev, noise)
        step.x.copy_(torch.where(keep, known, step.x))
        yield step
