"""Euler's method in σ, with optional churn (Karras et al. 2022, "EDM", algorithm 2 without its second-order part).

The paper's variable is x_t/√ᾱ_t = x_0 + σ ε. It lives inside formulas here: the x that goes in and out is x_t.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from minisd.diffusion.prediction import Model, as_prediction
from minisd.diffusion.samplers.step import Noise, Step, Timesteps, descent, sigma_from_abar
from minisd.diffusion.schedule import Schedule, Time, weighted_sum


def euler(
    model: Model,
    x: Tensor,
    schedule: Schedule,
    timesteps: Timesteps,
    *,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
    s_noise: float = 1.0,
    noise: Noise | None = None,
) -> Iterator[Step]:
    """Walk x down the falling timesteps and on to σ = 0; without churn this is ddim with a final ᾱ of 1.

    s_churn > 0 adds noise, s_noise times N(0, I), before each step at σ in [s_tmin, s_tmax] and so makes the sampler
    stochastic; spread over the steps, it may raise σ by √2 - 1 of itself at most. noise: see `ddim`.
    """
    noise = noise or torch.randn_like
    moves = list(descent(schedule, timesteps, end=1.0))
    for t, t_prev, abar_t, abar_prev in moves:
        sigma = sigma_from_abar(abar_t)
        gamma = min(s_churn / len(moves), math.sqrt(2) - 1) * ((s_tmin <= sigma) & (sigma <= s_tmax))
        t_hat, abar_hat = t, abar_t
        if gamma.any():
            t_hat, abar_hat = churned_time(sigma * (1 + gamma), schedule)
            x = churn(x, abar_t, abar_hat, s_noise * noise(x))
        prediction = as_prediction(model(x, t_hat), x, t_hat, schedule)
        x = euler_step(x, prediction.eps, abar_hat, abar_prev)
        yield Step(x, prediction.x_0, t, t_prev)


def euler_step(x: Tensor, eps: Tensor, abar_t: Tensor, abar_prev: Tensor) -> Tensor:
    """x_prev/√ᾱ_prev = x_t/√ᾱ_t + (σ_prev - σ_t) ε: the ODE dx/dσ = ε (EDM, eq. 3). ᾱ in (0, 1]: float64, '' or 'b'."""
    d_sigma = sigma_from_abar(abar_prev) - sigma_from_abar(abar_t)
    return weighted_sum((abar_prev / abar_t).sqrt(), x, abar_prev.sqrt() * d_sigma, eps)


def churn(x: Tensor, abar_t: Tensor, abar_hat: Tensor, noise: Tensor) -> Tensor:
    """Raise the noise in x from σ_t to σ_hat (EDM, algorithm 2, line 6). noise ~ N(0, I); ᾱ_hat <= ᾱ_t."""
    added = (sigma_from_abar(abar_hat) ** 2 - sigma_from_abar(abar_t) ** 2).sqrt()
    return weighted_sum((abar_hat / abar_t).sqrt(), x, abar_hat.sqrt() * added, noise)


def churned_time(sigma: Tensor, schedule: Schedule) -> tuple[Time, Tensor]:
    """The real t and the ᾱ of a σ. Above the schedule's largest σ the model is told T-1, as in k-diffusion."""
    t = schedule.t_from_sigma(sigma.clamp(max=schedule.sigmas[-1]))
    return t if t.ndim else t.item(), 1 / (1 + sigma**2)
