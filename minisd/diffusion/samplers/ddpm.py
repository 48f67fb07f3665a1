"""Ancestral sampling (Ho et al. 2020, "Denoising Diffusion Probabilistic Models", algorithm 2), on any timesteps."""

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from minisd.diffusion.gaussian import posterior_weights
from minisd.diffusion.prediction import Model, as_prediction
from minisd.diffusion.samplers.step import Noise, Step, Timesteps, descent
from minisd.diffusion.schedule import Schedule, expand, weighted_sum


def ddpm(
    model: Model,
    x: Tensor,
    schedule: Schedule,
    timesteps: Timesteps,
    *,
    variance: Literal["small", "large"] = "small",
    noise: Noise | None = None,
) -> Iterator[Step]:
    """Walk x down the descending timesteps and on to ᾱ = 1, where no noise is added.

    variance: of p(x_prev | x_t) where the model's Prediction brings no log_variance of its own, see `ddpm_variance`.
    A Prediction's mean, if it has one, takes the place of the posterior's. noise: see `ddim`.
    """
    noise = noise or torch.randn_like
    for t, t_prev, abar_t, abar_prev in descent(schedule, timesteps, end=1.0):
        prediction = as_prediction(model(x, t), x, t, schedule)
        mean = prediction.mean
        if mean is None:
            mean = posterior_mean(x, prediction.x_0, abar_t, abar_prev)
        if t_prev is None:
            x = mean
        elif prediction.log_variance is None:
            x = ddpm_step(mean, ddpm_variance(abar_t, abar_prev, variance).log(), noise(x))
        else:
            x = ddpm_step(mean, prediction.log_variance, noise(x))
        yield Step(x, prediction.x_0, t, t_prev)


def ddpm_step(mean: Tensor, log_variance: Tensor, noise: Tensor) -> Tensor:
    """x_prev ~ N(mean, exp(log_variance)) for noise ~ N(0, I). log_variance: 'b c h w', or float64 '' or 'b'."""
    if log_variance.ndim < mean.ndim:
        log_variance = expand(log_variance, mean)
    return (mean + (log_variance / 2).exp() * noise).to(mean.dtype)


def posterior_mean(x: Tensor, x_0: Tensor, abar_t: Tensor, abar_prev: Tensor) -> Tensor:
    """The mean of q(x_prev | x_t, x_0) (eq. 7), with the α and β of the whole jump from t to prev. ᾱ: '' or 'b'."""
    weight_0, weight_t = posterior_weights(abar_t, abar_prev)
    return weighted_sum(weight_0, x_0, weight_t, x)


def ddpm_variance(abar_t: Tensor, abar_prev: Tensor, variance: Literal["small", "large"]) -> Tensor:
    """ "large" is β of the jump from t to prev, "small" the posterior's β (1-ᾱ_prev)/(1-ᾱ_t) (section 3.2)."""
    beta = 1 - abar_t / abar_prev
    if variance == "large":
        return beta
    if variance == "small":
        return beta * (1 - abar_prev) / (1 - abar_t)
    raise ValueError(f"unknown variance {variance!r}; known: small, large")
