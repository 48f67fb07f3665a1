"""Linear multistep (Adams-Bashforth on an uneven grid) in σ, as k-diffusion has it."""

from collections.abc import Iterator, Sequence

import torch
from numpy.polynomial.legendre import leggauss
from torch import Tensor

from minisd.diffusion.prediction import Model, as_prediction
from minisd.diffusion.samplers.step import Noise, Step, Timesteps, descent, sigma_from_abar
from minisd.diffusion.schedule import Schedule, weighted_sum


def lms(
    model: Model, x: Tensor, schedule: Schedule, timesteps: Timesteps, *, order: int = 4, noise: Noise | None = None
) -> Iterator[Step]:
    """Walk x down the descending timesteps and on to σ = 0, one model call a step; draws no noise.

    order: how many slopes are combined, as far as there are so many; 1 is `euler`.
    """
    if order < 1:
        raise ValueError(f"order is {order}: the number of slopes to combine is 1 or more (4 is usual)")
    slopes: list[Tensor] = []
    sigmas: list[Tensor] = []
    for t, t_prev, abar_t, abar_prev in descent(schedule, timesteps, end=1.0):
        prediction = as_prediction(model(x, t), x, t, schedule)
        slopes, sigmas = [prediction.eps, *slopes][:order], [sigma_from_abar(abar_t), *sigmas][:order]
        x = lms_step(x, slopes, lms_coefficients(sigmas, sigma_from_abar(abar_prev)), abar_t, abar_prev)
        yield Step(x, prediction.x_0, t, t_prev)


def lms_step(
    x: Tensor, slopes: Sequence[Tensor], coefficients: Sequence[Tensor], abar_t: Tensor, abar_prev: Tensor
) -> Tensor:
    """x_prev/√ᾱ_prev = x_t/√ᾱ_t + Σ c_j ε_j, newest slope first. ᾱ in (0, 1] and c: float64, '' or 'b'."""
    terms = [term for c, eps in zip(coefficients, slopes, strict=True) for term in (abar_prev.sqrt() * c, eps)]
    return weighted_sum((abar_prev / abar_t).sqrt(), x, *terms)


def lms_coefficients(sigmas: Sequence[Tensor], sigma_prev: Tensor) -> list[Tensor]:
    """c_j = ∫ from sigmas[0] to sigma_prev of the j-th Lagrange polynomial on `sigmas`, newest first.

    By Gauss-Legendre quadrature, which is exact for them (k-diffusion integrates numerically, to 1e-4).
    """
    middle, half = (sigma_prev + sigmas[0]) / 2, (sigma_prev - sigmas[0]) / 2
    quadrature = [(middle + half * node, half * weight) for node, weight in zip(*leggauss(len(sigmas)), strict=True)]
    terms = [[weight * lagrange(sigmas, j, sigma) for sigma, weight in quadrature] for j in range(len(sigmas))]
    return [sum(each, start=torch.zeros_like(sigma_prev)) for each in terms]


def lagrange(nodes: Sequence[Tensor], j: int, at: Tensor) -> Tensor:
    """The polynomial that is 1 at nodes[j] and 0 at the others."""
    value = torch.ones_like(at)
    for k, node in enumerate(nodes):
        if k != j:
            value = value * (at - node) / (nodes[j] - node)
    return value
