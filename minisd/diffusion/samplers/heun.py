"""Heun's method in σ: an Euler step, then the same step with the slope averaged over both its ends (EDM, algorithm 2)."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from minisd.diffusion.prediction import Model, as_prediction
from minisd.diffusion.samplers.euler import churn, churned_time, euler_step
from minisd.diffusion.samplers.step import Noise, Step, Timesteps, descent, sigma_from_abar
from minisd.diffusion.schedule import Schedule


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
    """Walk x down the falling timesteps and on to σ = 0. Second order; two model calls a step, one in the last.

    s_churn and its companions: see `euler`. noise: see `ddim`.
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
        x_prev = euler_step(x, prediction.eps, abar_hat, abar_prev)
        if t_prev is not None:  # at σ = 0 there is no slope to ask for
            eps_prev = as_prediction(model(x_prev, t_prev), x_prev, t_prev, schedule).eps
            x_prev = heun_step(x, prediction.eps, eps_prev, abar_hat, abar_prev)
        x = x_prev
        yield Step(x, prediction.x_0, t, t_prev)


def heun_step(x: Tensor, eps: Tensor, eps_prev: Tensor, abar_t: Tensor, abar_prev: Tensor) -> Tensor:
    """x_prev/√ᾱ_prev = x_t/√ᾱ_t + (σ_prev - σ_t) (ε + ε_prev)/2, with ε_prev the model's at the end of an Euler step."""
    return euler_step(x, (eps + eps_prev) / 2, abar_t, abar_prev)
