"""What all samplers share: the `Step` they yield and the walk down the timesteps."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from minisd.diffusion.schedule import Schedule, Time

Noise = Callable[[Tensor], Tensor]
Timesteps = Sequence[Time] | Tensor


@dataclass(frozen=True, eq=False)
class Step:
    """One step taken: `x` at timestep `t_prev`, reached from `t`, where the model saw the clean image `x_0`.

    x, x_0: 'b c h w', of the sampler's input's dtype and device; x is variance preserving, √ᾱ x_0 + √(1-ᾱ) ε.
    t, t_prev: in [0, T-1]; t_prev is None where no timestep is left, and the sample is finished (t in `ddim_invert`).

    `x` is the very tensor that the sampler goes on from. To steer a trajectory, write into it before asking for the
    next step. Inpainting that blends known latents in, with a boolean `keep`, is (x_T having been blended likewise)

        for step in ddim(model, x_T, schedule, timesteps):
            known = latents if step.t_prev is None else schedule.q_sample(latents, step.t_prev, noise(latents))
            step.x.copy_(torch.where(keep, known, step.x))

    A sampler writes into nothing: Steps may be kept, and stay what they were.
    """

    x: Tensor
    x_0: Tensor
    t: Time | None
    t_prev: Time | None


def descent(
    schedule: Schedule, timesteps: Timesteps, *, end: float
) -> Iterator[tuple[Time, Time | None, Tensor, Tensor]]:
    """(t, t_prev, ᾱ at t, ᾱ at t_prev) of every step; after the last timestep t_prev is None and its ᾱ is `end`.

    timesteps: n numbers, or 'n b' where every image has its own; ValueError unless they descend. ᾱ: float64, '' or 'b'.
    """
    if isinstance(timesteps, Tensor):
        timesteps = timesteps.tolist() if timesteps.ndim == 1 else list(timesteps)
    for t, t_prev in pairwise(timesteps):
        if not torch.all(torch.as_tensor(t) > torch.as_tensor(t_prev)):
            raise ValueError(f"timesteps fall from noise to image, but {t_prev} was given after {t}")
    abars = [schedule.alpha_cumprod(t) for t in timesteps]
    end = torch.tensor(end, dtype=torch.float64)
    yield from zip(timesteps, [*timesteps[1:], None], abars, [*abars[1:], end], strict=False)


def sigma_from_abar(abar: Tensor) -> Tensor:
    """σ = √((1-ᾱ)/ᾱ), the noise level where x is not shrunk: x/√ᾱ = x_0 + σ ε. ValueError at ᾱ = 0, where σ = ∞."""
    if (abar == 0).any():
        raise ValueError(
            "σ is infinite where the schedule's ᾱ is 0 (zero terminal SNR), and this sampler steps in σ: "
            "use ddim, ddpm or dpmpp_2m, or timesteps that start below that one"
        )
    return ((1 - abar) / abar).sqrt()
