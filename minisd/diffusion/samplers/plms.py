"""PLMS (Liu et al. 2022, "Pseudo Numerical Methods for Diffusion Models on Manifolds"), as Stable Diffusion runs it."""

from collections.abc import Iterator

import torch
from torch import Tensor

from minisd.diffusion.prediction import Model, as_prediction
from minisd.diffusion.samplers.ddim import ddim_step
from minisd.diffusion.samplers.step import Noise, Step, Timesteps, descent
from minisd.diffusion.schedule import Schedule, weighted_sum


def plms(
    model: Model, x: Tensor, schedule: Schedule, timesteps: Timesteps, *, noise: Noise | None = None
) -> Iterator[Step]:
    """Walk x down the descending timesteps and on to `schedule.final_alpha_cumprod`; draws no noise.

    DDIM's step with an ε combined from the last four. The first step, which has no past, asks the model twice (the
    paper's Runge-Kutta start, four calls in each of three steps, is not what Stable Diffusion uses). A Step's x_0 is
    the combined ε's.
    """
    past: list[Tensor] = []
    half = torch.tensor(0.5)
    for t, t_prev, _, abar_prev in descent(schedule, timesteps, end=schedule.final_alpha_cumprod):
        prediction = as_prediction(model(x, t), x, t, schedule)
        if past or t_prev is None:
            eps = adams_bashforth(prediction.eps, *past)
        else:
            x_prev = ddim_step(prediction.x_0, prediction.eps, abar_prev)
            eps_prev = as_prediction(model(x_prev, t_prev), x_prev, t_prev, schedule).eps
            eps = weighted_sum(half, prediction.eps, half, eps_prev)
        past = [prediction.eps, *past][:3]
        x_0 = schedule.x_0_from_eps(x, t, eps)
        x = ddim_step(x_0, eps, abar_prev)
        yield Step(x, x_0, t, t_prev)


def adams_bashforth(*eps: Tensor) -> Tensor:
    """One ε from one to four, newest first, by the Adams-Bashforth formula of that order on an even grid (eq. 12)."""
    weights = {1: [1], 2: [3 / 2, -1 / 2], 3: [23 / 12, -16 / 12, 5 / 12], 4: [55 / 24, -59 / 24, 37 / 24, -9 / 24]}
    row = torch.tensor(weights[len(eps)], dtype=torch.float64)
    return weighted_sum(*(term for pair in zip(row, eps, strict=True) for term in pair))
