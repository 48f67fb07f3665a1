"""Repaint part of an image; what is not to be painted stays as it was, bit for bit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from minisd.tasks.options import Options

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image
    from torch import Tensor

    from minisd.diffusion.samplers import Step
    from minisd.diffusion.schedule import Schedule
    from minisd.models.vae import DiagonalGaussian
    from minisd.pipeline import CondNetwork, LatentDiffusion
    from minisd.tasks.sampling import Batch, Sampling


@dataclass(frozen=True, kw_only=True)
class Inpaint(Options):
    """Repaint an image where a mask is white; everything else is given back bit for bit.

    With a 9-channel inpainting model the U-Net sees the mask and the image without the masked part. With an ordinary
    model the known latents are noised and put back after every step (Lugmayr et al. 2022, eq. 8, without their
    resampling, and with one noise for all steps).

    Attributes:
        image: the image
        mask: of the same size, white where to repaint
        strength: denoising strength in (0, 1]; below 1, traces of what was under the mask remain
        exact_steps: run all steps, instead of the share that the strength leaves of them
        feather: pixels inside the mask over which the new part is blended in ("mask blur")
    """

    name: ClassVar[str] = "inpaint"

    strength: float = 1.0
    exact_steps: bool = False
    feather: int = 8

    def samplings(
        self,
        sd: LatentDiffusion,
        prompt: str | Sequence[str],
        image: Image,
        mask: Image,
        *,
        network: CondNetwork | None = None,
    ) -> Iterator[Sampling]:
        import torch

        from minisd.tasks.images import composite, inward_feather, pad_to_multiple, to_mask, to_tensor, to_uint8
        from minisd.tasks.img2img import partial_timesteps
        from minisd.tasks.sampling import Sampling, batches, denoise

        sd.check_task(self.name, "inpainting", "text-to-image")
        sees_mask = sd.config.task == "inpainting"
        pixels = to_tensor(image)
        height, width = pixels.shape[-2:]
        hole = to_mask(mask, (height, width))
        if not hole.any():
            raise ValueError("the mask has no white part: there is nothing to repaint")
        original, weight = to_uint8(pixels), inward_feather(hole, self.feather)
        timesteps = partial_timesteps(sd, self, self.strength, self.exact_steps)
        pixels, hole = (pad_to_multiple(x, sd.config.vae.factor) for x in (pixels, hole))
        if sees_mask:  # grey under the mask, as in training
            masked = sd.encode(torch.where(hole, 0.0, pixels), vae_tiling=self.vae_tiling)
        if self.strength < 1 or not sees_mask:
            posterior = sd.encode(pixels, vae_tiling=self.vae_tiling)

        def finish(images: Tensor) -> Tensor:
            return composite(original, to_uint8(images.cpu())[..., :height, :width], weight)

        for batch in batches(sd, prompt, self):
            if self.strength < 1 or not sees_mask:
                latents = batch.noise.sample(posterior)
            noise = batch.noise.draw(sd.latent_shape(*pixels.shape[-2:]))
            x_t = noise if self.strength == 1 else sd.schedule.q_sample(latents, timesteps[0], noise)
            if sees_mask:
                batch = with_mask(batch, hole, masked, sd.dtype)
                steps = denoise(sd, self, batch, x_t, timesteps, network)
            else:
                keep = kept_latents(hole, sd.config.vae.factor).to(x_t.device)
                x_t = torch.where(keep, sd.schedule.q_sample(latents, timesteps[0], noise), x_t)
                steps = denoise(sd, self, batch, x_t, timesteps, network)
                steps = blended(steps, latents, noise, keep, sd.schedule)
            yield Sampling(sd, self, batch, x_t, timesteps, steps, finish)


def with_mask(batch: Batch, hole: Tensor, masked: DiagonalGaussian, dtype: torch.dtype) -> Batch:
    """The batch, whose network sees after x_t the mask (1 is to be painted) and the latents of the rest, in this order.

    As in training, the mask of a latent is that of its upper left pixel.
    """
    import torch
    import torch.nn.functional as F

    latents = batch.noise.sample(masked)
    channel = F.interpolate(hole.float(), latents.shape[-2:], mode="nearest")
    if not channel.any():
        raise ValueError("the white part of the mask is too thin for this model to see: make it 8 pixels wide or more")
    concat = torch.cat([channel.to(latents).expand(len(latents), -1, -1, -1), latents], dim=1).to(dtype)
    uncond = batch.uncond and replace(batch.uncond, concat=concat)
    return replace(batch, cond=replace(batch.cond, concat=concat), uncond=uncond)


def kept_latents(hole: Tensor, factor: int) -> Tensor:
    """'1 1 h w' bool: True for a latent none of whose pixels is to be painted."""
    import torch.nn.functional as F

    return F.max_pool2d(hole.float(), factor) == 0


def blended(steps: Iterator[Step], latents: Tensor, noise: Tensor, keep: Tensor, schedule: Schedule) -> Iterator[Step]:
    """The steps, each with the known latents put back, noised to its timestep, before the sampler goes on from it."""
    for step in steps:
        known = latents if step.t_prev is None else schedule.q_sample(latents, step.t_prev, noise)
        step.x.copy_(known.where(keep, step.x))
        yield step
