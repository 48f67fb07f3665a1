"""An image from an image: noise it part of the way, and denoise it with the prompt (SDEdit, Meng et al. 2022)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from minisd.tasks.options import Options

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from minisd.diffusion.schedule import Time
    from minisd.pipeline import CondNetwork, LatentDiffusion
    from minisd.tasks.sampling import Sampling


@dataclass(frozen=True, kw_only=True)
class Img2Img(Options):
    """Redraw an image by a prompt.

    Attributes:
        image: the image to start from
        strength: denoising strength in (0, 1], 1 keeps next to nothing; only the last steps × strength steps run
        exact_steps: run all steps, spaced within that last part of the schedule
        height: resize the image first, in its own proportions where one side is given; else it keeps its size
        width: likewise
    """

    name: ClassVar[str] = "img2img"

    strength: float = 0.75
    exact_steps: bool = False
    height: int | None = None
    width: int | None = None

    def samplings(
        self, sd: LatentDiffusion, prompt: str | Sequence[str], image: Image, *, network: CondNetwork | None = None
    ) -> Iterator[Sampling]:
        from minisd.tasks.images import pad_to_multiple, to_tensor, to_uint8
        from minisd.tasks.sampling import Sampling, batches, denoise

        sd.check_task(self.name, "text-to-image")
        pixels = to_tensor(image, target_size(image, self.height, self.width))
        height, width = pixels.shape[-2:]
        timesteps = partial_timesteps(sd, self, self.strength, self.exact_steps)
        posterior = sd.encode(pad_to_multiple(pixels, sd.config.vae.factor), vae_tiling=self.vae_tiling)

        def finish(images: Tensor) -> Tensor:
            return to_uint8(images[..., :height, :width])

        for batch in batches(sd, prompt, self):
            x_0 = batch.noise.sample(posterior)
            x_t = sd.schedule.q_sample(x_0, timesteps[0], batch.noise(x_0))
            steps = denoise(sd, self, batch, x_t, timesteps, network)
            yield Sampling(sd, self, batch, x_t, timesteps, steps, finish)


def partial_timesteps(
    sd: LatentDiffusion, options: Options, strength: float, exact_steps: bool = False
) -> Sequence[Time]:
    """The timesteps of a denoising strength s: the last ⌊n·s⌋ of n, or, where exact_steps, n below T·s."""
    steps, below = options.steps, round(sd.schedule.num_timesteps * strength)
    spacing = options.spacing or "leading"
    if exact_steps:
        if steps > below:
            raise ValueError(
                f"strength {strength} leaves {below} of the schedule's {sd.schedule.num_timesteps} timesteps, too few "
                f"for exactly {steps} steps: use fewer steps, or a larger strength"
            )
        return sd.timesteps(steps, spacing, below)
    timesteps = sd.timesteps(steps, spacing)  # "compvis" may visit another number than was asked for
    count = math.floor(len(timesteps) * strength + 1e-9)  # the tiny term keeps 0.29 · 100 from being 28
    if count == 0:
        least = math.ceil(1000 / steps) / 1000
        raise ValueError(f"strength {strength} of {steps} steps runs none: use {least} or more, or exact_steps")
    return timesteps[-count:]


def target_size(image: Image, height: int | None, width: int | None) -> tuple[int, int] | None:
    """(height, width) to resize to, in the proportions of the upright image where only one was given."""
    from minisd.tasks.images import to_tensor

    if height is None and width is None:
        return None
    upright = to_tensor(image).shape[-2:]
    height = round(upright[0] * (width or 0) / upright[1]) if height is None else height
    width = round(upright[1] * height / upright[0]) if width is None else width
    if height < 1 or width < 1:
        raise ValueError(f"an image of {height}×{width} (height × width) was asked for: give 1 or more")
    return height, width
