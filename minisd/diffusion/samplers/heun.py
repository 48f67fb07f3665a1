"""Heun's method in σ (EDM, algorithm 2): an Euler step, taken again with the mean of the slopes at its two ends."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from minisd.diffusion.prediction import Model, as_prediction
from minisd.diffusion.samplers.euler import churn, churn_rate, euler_step
from minisd.diffusion.samplers.step import Noise, Step, Timesteps, descent, sigma_from_abar
from minisd.diffusion.schedule import Schedule, weighted_sum


def heun(
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
    """Walk x down the descending timesteps and on to σ = 0. Second order; two model calls a step, one in the last.

    s_churn and its companions: see `euler`. noise: see `ddim`.
    """
    noise = noise or torch.randn_like
    moves = list(descent(schedule, timesteps, end=1.0))
    for t, t_prev, abar_t, abar_prev in moves:
        gamma = churn_rate(abar_t, s_churn / len(moves), s_tmin, s_tmax)
        t_hat, abar_hat = t, abar_t
        if gamma.any():
            x, t_hat, abar_hat = churn(x, s_noise * noise(x), abar_t, gamma, schedule)
        prediction = as_prediction(model(x, t_hat), x, t_hat, schedule)
        x_prev = euler_step(x, prediction.eps, abar_hat, abar_prev)
        if t_prev is not None:  # at σ = 0 there is no slope to ask for
            eps_prev = as_prediction(model(x_prev, t_prev), x_prev, t_prev, schedule).eps
            x_prev = heun_step(x, prediction.eps, eps_prev, abar_hat, abar_prev)
        x = x_prev
        yield Step(x, prediction.x_0, t, t_prev)


def heun_step(x: Tensor, eps: Tensor, eps_prev: Tensor, abar_t: Tensor, abar_prev: Tensor) -> Tensor:
    """x_prev/√ᾱ_prev = x_t/√ᾱ_t + (σ_prev - σ_t) (ε + ε_prev)/2; ε_prev is the model's where `euler_step` leads.

    x, eps, eps_prev: 'b c h w'. ᾱ in (0, 1]: float64, '' or 'b'.
    """
    half = abar_prev.sqrt() * (sigma_from_abar(abar_prev) - sigma_from_abar(abar_t)) / 2
    return weighted_sum((abar_prev / abar_t).sqrt(), x, half, eps, half, eps_prev)
