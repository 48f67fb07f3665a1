"""An image from a prompt: prompt → context → noise → sampler(guided U-Net) → VAE → image."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from minisd.tasks.options import Options

if TYPE_CHECKING:
    from torch import Tensor

    from minisd.pipeline import CondNetwork, LatentDiffusion
    from minisd.tasks.sampling import Sampling


@dataclass(frozen=True, kw_only=True)
class Txt2Img(Options):
    """Generate images from prompts.

    Attributes:
        height: of the image in pixels, a multiple of the VAE's factor (8); the model's own size when left out
        width: likewise
        hires_fix: for sizes beyond the model's own: draw at its own size, enlarge, redraw with this denoising strength
            (0.5 to 0.7)
        variation_seed: mix the noise of this seed (+ i for image i) into that of the seed, by variation_strength
        variation_strength: 0 is the image of the seed, 1 that of the variation seed
    """

    name: ClassVar[str] = "txt2img"

    height: int | None = None
    width: int | None = None
    hires_fix: float | None = None
    variation_seed: int | None = None
    variation_strength: float = 0.0

    def samplings(
        self,
        sd: LatentDiffusion,
        prompt: str | Sequence[str],
        *,
        network: CondNetwork | None = None,
        latents: Tensor | None = None,
    ) -> Iterator[Sampling]:
        """latents: x_T 'n c h w' to start from, in place of noise."""
        import torch.nn.functional as F

        from minisd.tasks.img2img import partial_timesteps
        from minisd.tasks.sampling import Sampling, VariedNoise, batches, denoise

        sd.check_task(self.name, "text-to-image")
        height, width = sd.image_size(self.height, self.width)
        first = (height, width) if self.hires_fix is None else first_pass_size(sd, height, width)
        shape, timesteps = sd.latent_shape(*first), sd.timesteps(self.steps, self.spacing or "leading")
        second = [] if self.hires_fix is None else partial_timesteps(sd, self, self.hires_fix)

        for batch in batches(sd, prompt, self):
            if self.variation_seed is not None or self.variation_strength:
                noise = VariedNoise(batch.noise, batch.indices, self.seed, self.variation_seed, self.variation_strength)
                batch = replace(batch, seeds=[self.seed] * len(batch.seeds), noise=noise)
            x_T = batch.noise.draw(shape)
            if latents is not None:
                x_T = rows_of(latents, batch.indices, shape).to(x_T)
            steps = denoise(sd, self, batch, x_T, timesteps, network)
            sampling = Sampling(sd, self, batch, x_T, timesteps, steps, is_draft=first != (height, width))
            yield sampling

            if sampling.is_draft:
                for _ in sampling:  # the steps that the caller left
                    pass
                # not rounded to 8 bits on the way, which would magnify the float differences between batch sizes
                draft = sd.decode(sampling.latents, vae_tiling=self.vae_tiling).clamp(-1, 1)
                image = F.interpolate(draft, (height, width), mode="bicubic")
                x_0 = batch.noise.sample(sd.encode(image, vae_tiling=self.vae_tiling))
                x_t = sd.schedule.q_sample(x_0, second[0], batch.noise(x_0))
                steps = denoise(sd, self, batch, x_t, second, network)
                yield Sampling(sd, self, batch, x_t, second, steps)


def rows_of(latents: Tensor, indices: list[int], shape: tuple[int, ...]) -> Tensor:
    """The rows of x_T that a batch starts from."""
    if tuple(latents.shape[1:]) != shape or len(latents) <= max(indices):
        raise ValueError(
            f"latents have the shape {tuple(latents.shape)}: this call needs {(max(indices) + 1, *shape)} or more rows"
        )
    return latents[indices]


def first_pass_size(sd: LatentDiffusion, height: int, width: int) -> tuple[int, int]:
    """About the area that the model was trained at, in the proportions asked for; never larger than what was asked."""
    side, multiple = sd.config.image_size, sd.config.vae.factor * sd.config.unet.factor
    shrink = side / math.sqrt(height * width)
    if shrink >= 1:
        return height, width
    height, width = (
        min(length, max(multiple, round(shrink * length / multiple) * multiple)) for length in (height, width)
    )
    return height, width
