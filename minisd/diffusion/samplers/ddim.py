"""DDIM (Song, Meng & Ermon 2021, "Denoising Diffusion Implicit Models") and its inversion.

The one to read before writing a sampler of your own: ask the model, apply a formula, yield a Step.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from minisd.diffusion.prediction import Model, as_prediction
from minisd.diffusion.samplers.step import Noise, Step, Timesteps, descent
from minisd.diffusion.schedule import Schedule, weighted_sum


def ddim(
    model: Model, x: Tensor, schedule: Schedule, timesteps: Timesteps, *, eta: float = 0.0, noise: Noise | None = None
) -> Iterator[Step]:
    """Walk x down the descending timesteps and on to `schedule.final_alpha_cumprod`, one Step for each of them.

    x: x_t at timesteps[0], 'b c h w'. eta in [0, 1]: 0 is deterministic, 1 is ddpm. noise: draws N(0, I) like its
    argument, `torch.randn_like` if not given; called once per step that adds noise.
    """
    noise = noise or torch.randn_like
    for t, t_prev, abar_t, abar_prev in descent(schedule, timesteps, end=schedule.final_alpha_cumprod):
        prediction = as_prediction(model(x, t), x, t, schedule)
        sigma = ddim_sigma(abar_t, abar_prev, eta)
        x = ddim_step(prediction.x_0, prediction.eps, abar_prev, sigma, noise(x) if sigma.any() else None)
        yield Step(x, prediction.x_0, t, t_prev)


def ddim_step(
    x_0: Tensor, eps: Tensor, abar_prev: Tensor, sigma: Tensor | float = 0.0, noise: Tensor | None = None
) -> Tensor:
    """x_prev = √ᾱ_prev x_0 + √(1 - ᾱ_prev - σ²) ε + σ noise (eq. 12), from the x_0 and ε that a model sees in x_t.

    x_0, eps, noise: 'b c h w'. abar_prev in [0, 1] and sigma (of `ddim_sigma`): float64, '' or 'b'.
    """
    # The difference is never negative, but for rounding where it is 0.
    direction = (1 - abar_prev - sigma**2).clamp(min=0).sqrt()
    added = () if noise is None else (sigma, noise)
    return weighted_sum(abar_prev.sqrt(), x_0, direction, eps, *added)


def ddim_sigma(abar_t: Tensor, abar_prev: Tensor, eta: float) -> Tensor:
    """σ = η √((1 - ᾱ_prev)/(1 - ᾱ_t)) √(1 - ᾱ_t/ᾱ_prev), the noise of one step (eq. 16): not the σ of `Schedule`."""
    if not 0 <= eta <= 1:
        raise ValueError(f"eta is {eta}: it lies in [0, 1], from deterministic to ddpm")
    return eta * ((1 - abar_prev) / (1 - abar_t) * (1 - abar_t / abar_prev)).sqrt()


def ddim_invert(
    model: Model, x: Tensor, schedule: Schedule, timesteps: Timesteps, *, iterations: int = 1
) -> Iterator[Step]:
    """The way back: from a clean x up the same timesteps, last to first; `ddim` takes the final Step.x to x.

    iterations=1 takes ε at (x_prev, t) instead of the unknown (x_t, t), which is right to first order and what most
    implementations do; each further iteration puts the x_t it found in its place, until the round trip is exact.
    A Step's t is the timestep it left (None: clean), and t_prev, the higher one, is where x is now.
    """
    if iterations < 1:
        raise ValueError(f"iterations is {iterations}: give 1 or more")
    for t, t_prev, abar_t, abar_prev in reversed(list(descent(schedule, timesteps, end=schedule.final_alpha_cumprod))):
        x_t = x
        for _ in range(iterations):
            prediction = as_prediction(model(x_t, t), x_t, t, schedule)
            x_t = ddim_invert_step(x, prediction.eps, abar_t, abar_prev)
        x = x_t
        yield Step(x, prediction.x_0, t_prev, t)


def ddim_invert_step(x_prev: Tensor, eps: Tensor, abar_t: Tensor, abar_prev: Tensor) -> Tensor:
    """The x_t that `ddim_step`, given this ε and no noise, takes to x_prev. ᾱ in (0, 1]: float64, '' or 'b'."""
    ratio = abar_t / abar_prev
    return weighted_sum(ratio.sqrt(), x_prev, (1 - abar_t).sqrt() - (ratio * (1 - abar_prev)).sqrt(), eps)
