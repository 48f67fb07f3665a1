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
    """Walk x down the descending timesteps and on to σ = 0; without churn this is ddim with a final ᾱ of 1.

    s_churn > 0, shared out among the steps, makes the sampler stochastic: before each step at σ in [s_tmin, s_tmax] it
    raises σ, by 41 % at most, with s_noise times the noise that this takes. noise: see `ddim`.
    """
    noise = noise or torch.randn_like
    moves = list(descent(schedule, timesteps, end=1.0))
    for t, t_prev, abar_t, abar_prev in moves:
        gamma = churn_rate(abar_t, s_churn / len(moves), s_tmin, s_tmax)
        t_hat, abar_hat = t, abar_t
        if gamma.any():
            x, t_hat, abar_hat = churn(x, s_noise * noise(x), abar_t, gamma, schedule)
        prediction = as_prediction(model(x, t_hat), x, t_hat, schedule)
        x = euler_step(x, prediction.eps, abar_hat, abar_prev)
        yield Step(x, prediction.x_0, t, t_prev)


def euler_step(x: Tensor, eps: Tensor, abar_t: Tensor, abar_prev: Tensor) -> Tensor:
    """x_prev/√ᾱ_prev = x_t/√ᾱ_t + (σ_prev - σ_t) ε: the ODE dx/dσ = ε (EDM, eq. 3). ᾱ in (0, 1]: float64, '' or 'b'."""
    d_sigma = sigma_from_abar(abar_prev) - sigma_from_abar(abar_t)
    return weighted_sum((abar_prev / abar_t).sqrt(), x, abar_prev.sqrt() * d_sigma, eps)


def churn_rate(abar_t: Tensor, most: float, s_tmin: float, s_tmax: float) -> Tensor:
    """γ, the share by which σ is raised before a step: `most`, up to √2 - 1, where s_tmin <= σ <= s_tmax, else 0."""
    if most < 0:
        raise ValueError("s_churn is negative: it is 0 (no noise is added) or more")
    sigma = sigma_from_abar(abar_t)
    return min(most, math.sqrt(2) - 1) * ((s_tmin <= sigma) & (sigma <= s_tmax)).to(sigma)


def churn(x: Tensor, noise: Tensor, abar_t: Tensor, gamma: Tensor, schedule: Schedule) -> tuple[Tensor, Time, Tensor]:
    """(x, t, ᾱ) at σ_hat = (1 + γ) σ_t: x/√ᾱ gains √(σ_hat² - σ_t²) noise (algorithm 2, lines 5 and 6).

    Where σ_hat is above the schedule's largest finite σ the model is told the timestep of that one, as in k-diffusion.
    """
    sigma = sigma_from_abar(abar_t)
    sigma_hat = (1 + gamma) * sigma
    abar_hat = 1 / (1 + sigma_hat**2)
    added = (sigma_hat**2 - sigma**2).sqrt()
    x_hat = weighted_sum((abar_hat / abar_t).sqrt(), x, abar_hat.sqrt() * added, noise)
    sigma_max = schedule.sigmas[schedule.sigmas.isfinite()].max()
    t_hat = schedule.t_from_sigma(sigma_hat.clamp(max=sigma_max))
    return x_hat, t_hat if t_hat.ndim else t_hat.item(), abar_hat
