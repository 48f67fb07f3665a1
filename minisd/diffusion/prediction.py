"""From a network's raw output to the model a sampler asks.

A sampler's `model(x_t, t)` is any callable returning ε, or a `Prediction` where ε alone does not say it all. Networks
with a learned variance belong to a chain of steps: `gaussian.from_network`.
"""

from collections.abc import Callable
from dataclasses import replace

from torch import Tensor

from minisd.diffusion.schedule import Prediction, Schedule, Time

Network = Callable[[Tensor, Time], Tensor]
Model = Callable[[Tensor, Time], Tensor | Prediction]


def as_prediction(output: Tensor | Prediction, x_t: Tensor, t: Time, schedule: Schedule) -> Prediction:
    """What a model returned, as a Prediction: a Tensor is ε."""
    if isinstance(output, Prediction):
        return output
    return Prediction(output, schedule.x_0_from_eps(x_t, t, output))


def from_x_0(network: Network, schedule: Schedule) -> Model:
    """A model out of a network that predicts x_0."""

    def model(x_t: Tensor, t: Time) -> Prediction:
        x_0 = network(x_t, t)
        return Prediction(schedule.eps_from_x_0(x_t, t, x_0), x_0)

    return model


def from_v(network: Network, schedule: Schedule) -> Model:
    """A model out of a network that predicts v; well defined at every ᾱ, 0 included."""

    def model(x_t: Tensor, t: Time) -> Prediction:
        v = network(x_t, t)
        return Prediction(schedule.eps_from_v(x_t, t, v), schedule.x_0_from_v(x_t, t, v))

    return model


def clipped(model: Model, schedule: Schedule, low: float = -1.0, high: float = 1.0) -> Model:
    """The model with x_0 clamped to [low, high] and ε re-derived from it. For pixels; latents have no such bounds."""

    def clipped_model(x_t: Tensor, t: Time) -> Prediction:
        prediction = as_prediction(model(x_t, t), x_t, t, schedule)
        x_0 = prediction.x_0.clamp(low, high)
        return replace(prediction, x_0=x_0, eps=schedule.eps_from_x_0(x_t, t, x_0))

    return clipped_model
