"""The samplers, one algorithm per file. `ddim.py` is the one to read first; `step.py` holds what all of them share.

A sampler is a generator function `(model, x, schedule, timesteps, *, noise=None, …) -> Iterator[Step]`:

    for step in ddim(model, x_T, schedule, schedule.timesteps(50)):
        ...                                  # progress bars, previews, blending, early stops: the loop is the caller's
    image = step.x

One of your own needs no registration: pass the function itself wherever a sampler's name is taken.
"""

from collections.abc import Callable, Iterator

from minisd.diffusion.samplers.ddim import ddim, ddim_invert
from minisd.diffusion.samplers.ddpm import ddpm
from minisd.diffusion.samplers.dpmpp_2m import dpmpp_2m
from minisd.diffusion.samplers.euler import euler
from minisd.diffusion.samplers.euler_ancestral import euler_ancestral
from minisd.diffusion.samplers.heun import heun
from minisd.diffusion.samplers.lms import lms
from minisd.diffusion.samplers.plms import plms
from minisd.diffusion.samplers.step import Step

Sampler = Callable[..., Iterator[Step]]

SAMPLERS: dict[str, Sampler] = {
    "ddim": ddim,
    "ddpm": ddpm,
    "dpmpp_2m": dpmpp_2m,
    "euler": euler,
    "euler_ancestral": euler_ancestral,
    "heun": heun,
    "lms": lms,
    "plms": plms,
}

__all__ = ["SAMPLERS", "Sampler", "Step", "ddim_invert", "get_sampler", *SAMPLERS]


def get_sampler(sampler: str | Sampler) -> Sampler:
    """The sampler of that name; a callable is itself."""
    if callable(sampler):
        return sampler
    if sampler not in SAMPLERS:
        raise ValueError(f"unknown sampler {sampler!r}; known: {', '.join(SAMPLERS)}")
    return SAMPLERS[sampler]
