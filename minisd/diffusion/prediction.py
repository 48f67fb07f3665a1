"""From a network's raw output to what a sampler asks for.

A sampler's `model(x_t, t)` is any callable returning ε, or a `Prediction` where ε alone does not say it all. Networks
with a learned variance belong to a chain of steps: `gaussian.from_network`.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor

from minisd.diffusion.schedule import Schedule, Time


@dataclass(frozen=True, eq=False)
class Prediction:
    """What a model predicts from x_t: noise and clean image, tied to each other by x_t = √ᾱ x_0 + √(1-ᾱ) ε.

    eps, x_0: 'b c h w'. log_variance: of p(x_{t-1} | x_t), 'b c h w', where the network learns it.
    mean: of p(x_{t-1} | x_t), where it is not the posterior's at x_0 (a network that predicts x_{t-1}; classifier
    guidance). Only ddpm and the variational bound look at these two.
    """

    eps: Tensor
    x_0: Tensor
    log_variance: Tensor | None = None
    mean: Tensor | None = None


Network = Callable[[Tensor, Time], Tensor]
Model = Callable[[Tensor, Time], Tensor | Prediction]


def as_prediction(
    output: Tensor | Prediction, x_t: Tensor, t: Time, schedule: Schedule, predicts: str = "eps"
) -> Prediction:
    """What a model returned, as a Prediction. predicts: "eps", "v" or "x_0", what a Tensor is.

    v is well defined at every ᾱ, 0 included; ε is not.
    """
    if isinstance(output, Prediction):
        return output
    match predicts:
        case "eps":
            return Prediction(output, schedule.x_0_from_eps(x_t, t, output))
        case "v":
            return Prediction(schedule.eps_from_v(x_t, t, output), schedule.x_0_from_v(x_t, t, output))
        case "x_0":
            return Prediction(schedule.eps_from_x_0(x_t, t, output), output)
    raise ValueError(f"a network cannot predict {predicts!r}; known: eps, v, x_0")


def as_model(network: Network, schedule: Schedule, predicts: str = "eps") -> Model:
    """A sampler's model out of a network that predicts ε, v or x_0."""
    return lambda x_t, t: as_prediction(network(x_t, t), x_t, t, schedule, predicts)


def clipped(model: Model, schedule: Schedule, low: float = -1.0, high: float = 1.0) -> Model:
    """The model with x_0 clamped to [low, high] and ε re-derived from it. For pixels; latents have no such bounds."""

    def clipped_model(x_t: Tensor, t: Time) -> Prediction:
        prediction = as_prediction(model(x_t, t), x_t, t, schedule)
        x_0 = prediction.x_0.clamp(low, high)
        return replace(prediction, x_0=x_0, eps=schedule.eps_from_x_0(x_t, t, x_0))

    return clipped_model
