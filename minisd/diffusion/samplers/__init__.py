"""The samplers, one algorithm per file. `ddim.py` is the one to read first; `step.py` holds what all of them share.

A sampler is a generator function `(model, x, schedule, timesteps, *, noise=None, …) -> Iterator[Step]`:

    for step in ddim(model, x_T, schedule, schedule.timesteps(50)):
        ...                                  # progress bars, previews, blending, early stops: the loop is the caller's
    image = step.x

One of your own needs no registration: pass the function itself wherever a sampler's name is taken.
"""

import inspect
from collections.abc import Callable, Iterator
from functools import partial

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

__all__ = ["SAMPLERS", "Sampler", "Step", "ddim_invert", "get_sampler", "options_of", *SAMPLERS]


def get_sampler(sampler: str | Sampler, eta: float | None = None) -> Sampler:
    """The sampler of that name, its own options behind a colon ("euler:s_churn=40,s_noise=1.003").

    A callable is itself. eta: for a sampler that has one; None is its own. ValueError for a name, an option or a value
    that there is not.
    """
    if callable(sampler):
        return sampler if eta is None else partial(sampler, eta=eta)
    name, _, text = sampler.partition(":")
    if name not in SAMPLERS:
        raise ValueError(f"unknown sampler {name!r}; known: {', '.join(SAMPLERS)}")
    own = options_of(name)
    options: dict[str, float | str] = {} if eta is None else {"eta": eta}
    if eta is not None and "eta" not in own:
        have = ", ".join(other for other in SAMPLERS if "eta" in options_of(other))
        raise ValueError(f"eta={eta} belongs to {have}, not to {name}: leave it out")
    for setting in filter(None, text.split(",")):
        option, _, value = setting.partition("=")
        if option not in own:
            raise ValueError(f"the sampler {name} has no option {option!r}; it has: {', '.join(own) or 'none'}")
        if option in options:
            raise ValueError(f"{option} is given twice, {options[option]} and {value}: give it once")
        try:
            options[option] = value if isinstance(own[option], str) else type(own[option])(value)
        except ValueError:
            raise ValueError(f"{name}:{setting}: {option} is a number, {own[option]} by default") from None
    return partial(SAMPLERS[name], **options) if options else SAMPLERS[name]


def options_of(name: str) -> dict[str, float | int | str]:
    """A sampler's own keywords and their defaults."""
    keywords = inspect.signature(SAMPLERS[name]).parameters.values()
    return {p.name: p.default for p in keywords if p.kind is p.KEYWORD_ONLY and p.name != "noise"}
