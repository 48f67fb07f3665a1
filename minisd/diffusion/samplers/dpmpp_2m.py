"""DPM-Solver++(2M) (Lu et al. 2022, arXiv:2211.01095, algorithm 2), the deterministic multistep solver in x_0."""

from collections.abc import Iterator

from torch import Tensor

from minisd.diffusion.prediction import Model, as_prediction
from minisd.diffusion.samplers.step import Noise, Step, Timesteps, descent
from minisd.diffusion.schedule import Schedule, weighted_sum


def dpmpp_2m(
    model: Model, x: Tensor, schedule: Schedule, timesteps: Timesteps, *, noise: Noise | None = None
) -> Iterator[Step]:
    """Walk x down the descending timesteps and on to σ = 0. Second order at one model call a step; draws no noise.

    The first step, which has no past, and the last, where λ becomes infinite, are of first order (DDIM's).
    """
    previous: tuple[Tensor, Tensor] | None = None  # x_0 and h of the step before
    for t, t_prev, abar_t, abar_prev in descent(schedule, timesteps, end=1.0):
        x_0 = as_prediction(model(x, t), x, t, schedule).x_0
        h = half_log_snr(abar_prev) - half_log_snr(abar_t)
        if previous is None or t_prev is None:
            estimate = x_0
        else:
            x_0_before, h_before = previous
            estimate = extrapolate(x_0, x_0_before, h_before / h)
        x = dpmpp_step(x, estimate, abar_t, abar_prev)
        previous = x_0, h
        yield Step(x, x_0, t, t_prev)


def dpmpp_step(x: Tensor, x_0: Tensor, abar_t: Tensor, abar_prev: Tensor) -> Tensor:
    """x_prev = σ_prev/σ_t x_t - α_prev (e^-h - 1) x_0, where α = √ᾱ, σ = √(1-ᾱ) and h = λ_prev - λ_t (eq. 9, k = 1).

    x_0 held constant over the step: DDIM; `extrapolate` makes it second order. ᾱ: float64, '' or 'b'.
    """
    shrink = ((1 - abar_prev) / (1 - abar_t)).sqrt()
    return weighted_sum(shrink, x, abar_prev.sqrt() - shrink * abar_t.sqrt(), x_0)


def extrapolate(x_0: Tensor, x_0_before: Tensor, r: Tensor) -> Tensor:
    """x_0 half a step ahead, on the line through the last two estimates: (1 + 1/2r) x_0 - 1/2r x_0_before (line 8).
    r: the previous step's length in λ over this one's."""
    return weighted_sum(1 + 1 / (2 * r), x_0, -1 / (2 * r), x_0_before)


def half_log_snr(abar: Tensor) -> Tensor:
    """λ = log(√ᾱ/√(1-ᾱ)), the paper's time; -∞ at ᾱ = 0 and ∞ at 1, which `dpmpp_step` can both take."""
    return (abar / (1 - abar)).log() / 2
