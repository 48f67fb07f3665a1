"""Guidance: steer a model away from its unconditional output (classifier-free), or by a classifier's gradient."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from minisd.diffusion.gaussian import Chain, FixedVariance, p_mean_variance
from minisd.diffusion.prediction import Model, Prediction, as_prediction
from minisd.diffusion.schedule import Schedule, Time, expand, weighted_sum

Cond = TypeVar("Cond", bound="Joinable")


class Joinable(Protocol):
    """Conditions of a batch; `type(cond).cat([uncond, cond])` is the batch of both."""

    @classmethod
    def cat(cls: type[Cond], parts: Sequence[Cond], /) -> Cond: ...


def guided(
    network: Callable[[Tensor, Time, Cond], Tensor],
    cond: Cond,
    uncond: Cond | None = None,
    scale: float | Sequence[float] | Tensor = 7.5,
    *,
    rescale: float = 0.0,
    interval: tuple[float, float] | None = None,
    joined: bool = True,
    dtype: torch.dtype | None = None,
) -> Callable[[Tensor, Time], Tensor]:
    """The network (x_t, t, cond) as (x_t, t), guided without a classifier (Ho & Salimans 2022, eq. 6; scale is w + 1).

    out = out_u + scale (out_c - out_u). uncond is the empty or the negative prompt. scale: one number or one per image;
    1 is the conditional network alone, at half the cost, and needs no uncond. interval: guide only where lo <= t <= hi
    (Kynkäänniemi et al. 2024), elsewhere scale is 1. rescale: see `rescaled`. joined: one call with a batch of both,
    or two calls, which need less memory and let the contexts differ in length. dtype: in which the network is given
    x_t; the result has x_t's own.

    ε, x_0 and v are the same affine functions of one another for either condition, so guiding one guides all; rescale
    alone depends on which of them the network returns, and acts on that, as its authors do.
    """
    scale = torch.as_tensor(scale, dtype=torch.float64, device="cpu")
    if scale.ndim > 1:
        raise ValueError(f"scale has shape {tuple(scale.shape)}: give one number, or one per image")
    if uncond is None and (scale != 1).any():
        raise ValueError(f"guidance by {scale.tolist()} needs uncond, the encoding of the empty or negative prompt")
    if not 0 <= rescale <= 1:
        raise ValueError(f"rescale is {rescale}: it lies in [0, 1]")

    both = type(cond).cat([uncond, cond]) if joined and uncond is not None and (scale != 1).any() else None

    def model(x_t: Tensor, t: Time) -> Tensor:
        w = scale if interval is None else torch.where(_within(t, interval), scale, 1.0)
        x = x_t if dtype is None else x_t.to(dtype)
        if uncond is None or (w == 1).all():
            return network(x, t, cond).to(x_t.dtype)
        if both is not None:
            t_both = torch.cat([t, t]) if isinstance(t, Tensor) and t.ndim else t
            out_u, out_c = network(torch.cat([x, x]), t_both, both).chunk(2)
        else:
            out_u, out_c = network(x, t, uncond), network(x, t, cond)
        # Half-precision outputs are subtracted in float32: scale would multiply the rounding of their difference.
        wide = torch.promote_types(out_c.dtype, torch.float32)
        out = out_u.to(wide) + expand(w, out_c) * (out_c.to(wide) - out_u.to(wide))
        return (rescaled(out, out_c.to(wide), rescale) if rescale else out).to(x_t.dtype)

    return model


def rescaled(out: Tensor, out_c: Tensor, rescale: float) -> Tensor:
    """The guided output with the standard deviation of the conditional one, in part: rescale in [0, 1] is φ.

    Lin et al. 2023, eq. 15 and 16, against the over-exposure of large scales: theirs is 0.7 at scale 7.5. The deviation
    is taken over each image of the network's own output, be it ε or v.
    """
    dims = tuple(range(1, out.ndim))
    std = out.std(dim=dims, keepdim=True).clamp(min=torch.finfo(out.dtype).tiny)  # an untrained network may give zeros
    return out * (rescale * out_c.std(dim=dims, keepdim=True) / std + 1 - rescale)


def _within(t: Time, interval: tuple[float, float]) -> Tensor:
    t = torch.as_tensor(t, device="cpu")
    return (t >= interval[0]) & (t <= interval[1])


Gradient = Callable[[Tensor, Time], Tensor]


def classifier_gradient(classifier: Callable[[Tensor, Time], Tensor], y: Tensor, scale: float = 1.0) -> Gradient:
    """scale · ∇ log p(y | x_t) as a function (x_t, t) (Dhariwal & Nichol 2021, algorithm 1).

    classifier(x_t, t): logits 'b classes' of noisy images. y: LongTensor 'b'.
    """

    def gradient(x_t: Tensor, t: Time) -> Tensor:
        with torch.enable_grad():
            x = x_t.detach().requires_grad_()
            log_p = classifier(x, t).log_softmax(dim=-1).gather(-1, y[:, None].to(x.device))
            # Summed over images: each has its own gradient, whatever the size of the batch.
            return scale * torch.autograd.grad(log_p.sum(), x)[0]

    return gradient


def classifier_guided(model: Model, gradient: Gradient, schedule: Schedule) -> Model:
    """ε - √(1-ᾱ) ∇ log p(y|x_t), with the x_0 that follows (Dhariwal & Nichol 2021, eq. 14): for any sampler."""

    def guided_model(x_t: Tensor, t: Time) -> Prediction:
        prediction = as_prediction(model(x_t, t), x_t, t, schedule)
        one = torch.ones((), dtype=torch.float64)
        eps = weighted_sum(one, prediction.eps, -(1 - schedule.alpha_cumprod(t)).sqrt(), gradient(x_t, t))
        return replace(prediction, eps=eps, x_0=schedule.x_0_from_eps(x_t, t, eps), mean=None)

    return guided_model


def classifier_guided_mean(
    model: Model, gradient: Gradient, chain: Chain, *, variance: FixedVariance = "small"
) -> Model:
    """The mean of p(x_{t-1}|x_t) moved by Σ ∇ log p(y|x_t) (Dhariwal & Nichol 2021, algorithm 1): for ddpm.

    x_0 and ε stay the unguided model's. variance: what ddpm is told, where the model has no log_variance of its own.
    """

    def guided_model(x_t: Tensor, t: Time) -> Prediction:
        prediction = as_prediction(model(x_t, t), x_t, t, chain.schedule)
        p = p_mean_variance(prediction, x_t, chain.index(t), chain, variance=variance)
        return replace(prediction, mean=p.mean + p.log_variance.exp() * gradient(x_t, t))

    return guided_model
