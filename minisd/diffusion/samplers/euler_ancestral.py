"""Ancestral sampling with Euler steps, as k-diffusion has it: step below σ_prev, then add noise up to it."""

from collections.abc import Iterator

import torch
from torch import Tensor

from minisd.diffusion.prediction import Model, as_prediction
from minisd.diffusion.samplers.step import Noise, Step, Timesteps, descent, sigma_from_abar
from minisd.diffusion.schedule import Schedule, weighted_sum


def euler_ancestral(
    model: Model,
    x: Tensor,
    schedule: Schedule,
    timesteps: Timesteps,
    *,
    eta: float = 1.0,
    s_noise: float = 1.0,
    noise: Noise | None = None,
) -> Iterator[Step]:
    """Walk x down the descending timesteps and on to σ = 0, where no noise is added.

    eta in [0, 1], from `euler` to ddpm; s_noise multiplies the noise. With s_noise = 1 this is ddim of the same eta and
    a final ᾱ of 1. noise: see `ddim`.
    """
    noise = noise or torch.randn_like
    for t, t_prev, abar_t, abar_prev in descent(schedule, timesteps, end=1.0):
        prediction = as_prediction(model(x, t), x, t, schedule)
        sigma_down, sigma_up = ancestral_sigmas(sigma_from_abar(abar_t), sigma_from_abar(abar_prev), eta)
        fresh = s_noise * noise(x) if sigma_up.any() else torch.zeros_like(x)
        x = euler_ancestral_step(x, prediction.eps, fresh, abar_t, abar_prev, sigma_down, sigma_up)
        yield Step(x, prediction.x_0, t, t_prev)


def euler_ancestral_step(
    x: Tensor, eps: Tensor, noise: Tensor, abar_t: Tensor, abar_prev: Tensor, sigma_down: Tensor, sigma_up: Tensor
) -> Tensor:
    """x_prev/√ᾱ_prev = x_t/√ᾱ_t + (σ_down - σ_t) ε + σ_up noise. ᾱ in (0, 1] and σ: float64, '' or 'b'."""
    d_sigma = sigma_down - sigma_from_abar(abar_t)
    root = abar_prev.sqrt()
    return weighted_sum((abar_prev / abar_t).sqrt(), x, root * d_sigma, eps, root * sigma_up, noise)


def ancestral_sigmas(sigma_t: Tensor, sigma_prev: Tensor, eta: float) -> tuple[Tensor, Tensor]:
    """(σ_down, σ_up): σ_down² + σ_up² = σ_prev², σ_up² = η² σ_prev² (1 - σ_prev²/σ_t²), DDPM's variance at η = 1."""
    if not 0 <= eta <= 1:
        raise ValueError(f"eta is {eta}: it lies in [0, 1], from euler to ddpm")
    share = eta**2 * (1 - (sigma_prev / sigma_t) ** 2)
    return sigma_prev * (1 - share).sqrt(), sigma_prev * share.sqrt()
