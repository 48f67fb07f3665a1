"""Improved DDPM's reverse process: every step a Gaussian, its variance fixed or learned.

Ho et al. 2020 is "Ho", Nichol & Dhariwal 2021 is "ND". q(x_{t-1}|x_t,x_0) is `posterior`, p(x_{t-1}|x_t), from what a
network predicts, `p_mean_variance`; the variational bound that compares them is in `training/improved_ddpm.py`. A step
of a chain is named by its index i (int, or LongTensor 'b' on the CPU); the model always receives the timestep t =
chain.t(i) of the schedule it was trained on.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from minisd.diffusion.prediction import Model, Network, Prediction, as_prediction
from minisd.diffusion.schedule import Schedule, Time, expand, weighted_sum

Index = int | Tensor


class Chain:
    """A respaced schedule: the timesteps kept, i = 0 the cleanest, and the betas of the jumps between them (ND eq. 19).

    timesteps: distinct, in any order; None keeps all. ᾱ = 1 comes before the first. All tables are float64, 'n'.
    """

    def __init__(self, schedule: Schedule, timesteps: Sequence[float] | None = None):
        self.schedule = schedule
        times = sorted(range(schedule.num_timesteps) if timesteps is None else timesteps)
        self.timesteps = torch.tensor(times, dtype=torch.float64 if any(t % 1 for t in times) else torch.int64)
        if not len(self.timesteps) or (self.timesteps.diff() <= 0).any():
            raise ValueError(f"a chain needs distinct times, at least one: {self.timesteps.tolist()}")
        abar = self.alphas_cumprod = schedule.alpha_cumprod(self.timesteps)
        prev = self.alphas_cumprod_prev = torch.cat([abar.new_ones(1), abar[:-1]])
        self.betas = 1 - abar / prev
        self.posterior_variances = self.betas * (1 - prev) / (1 - abar)  # β̃, Ho eq. 7
        # β̃_0 = 0 has no logarithm: β̃_1 stands in, as in the original (a chain of one step has only its β).
        stand_in = self.posterior_variances[1:2] if len(abar) > 1 else self.betas
        self.log_betas = self.betas.log()
        self.log_variances = {
            "small": torch.cat([stand_in, self.posterior_variances[1:]]).log(),
            "large": torch.cat([stand_in, self.betas[1:]]).log(),
        }

    def __len__(self) -> int:
        return len(self.timesteps)

    def t(self, i: Index) -> Time:
        """The schedule's timestep of step i: a number for an int, a tensor 'b' for a tensor."""
        return self.timesteps[i] if isinstance(i, Tensor) else self.timesteps[i].item()

    def index(self, t: Time) -> Index:
        """The step whose timestep is t, the inverse of `t`."""
        times, target = self.timesteps.double(), torch.as_tensor(t, dtype=torch.float64, device="cpu")
        i = torch.searchsorted(times, target).clamp(max=len(self) - 1)
        if (times[i] != target).any():
            raise ValueError(f"t = {t} is not a step of this chain of {len(self)}: {self.timesteps.tolist()}")
        return i if isinstance(t, Tensor) else int(i)

    def q_sample(self, x_0: Tensor, i: Index, noise: Tensor) -> Tensor:
        """x_i = √ᾱ_i x_0 + √(1-ᾱ_i) ε (Ho eq. 4)."""
        return self.schedule.q_sample(x_0, self.t(i), noise)


@dataclass(frozen=True)
class Gaussian:
    """A diagonal Gaussian. mean: 'b ...'; log_variance: anything that broadcasts to it."""

    mean: Tensor
    log_variance: Tensor


def posterior(x_0: Tensor, x_t: Tensor, i: Index, chain: Chain) -> Gaussian:
    """q(x_{i-1} | x_i, x_0), with mean μ̃ and variance β̃ (Ho eq. 6 and 7; β̃_1 at i = 0)."""
    c_0, c_t = posterior_weights(chain.alphas_cumprod[i], chain.alphas_cumprod_prev[i])
    return Gaussian(weighted_sum(c_0, x_0, c_t, x_t), expand(chain.log_variances["small"][i], x_t))


def x_0_from_mean(mean: Tensor, x_t: Tensor, i: Index, chain: Chain) -> Tensor:
    """The x_0 whose posterior has this mean: Ho eq. 7 solved for x_0."""
    c_0, c_t = posterior_weights(chain.alphas_cumprod[i], chain.alphas_cumprod_prev[i])
    return weighted_sum(1 / c_0, mean, -c_t / c_0, x_t)


def posterior_weights(abar_t: Tensor, abar_prev: Tensor) -> tuple[Tensor, Tensor]:
    """The weights of x_0 and x_t in μ̃ (Ho eq. 7), float64: √ᾱ_prev β/(1-ᾱ_t) and √α (1-ᾱ_prev)/(1-ᾱ_t)."""
    alpha = abar_t / abar_prev
    return abar_prev.sqrt() * (1 - alpha) / (1 - abar_t), alpha.sqrt() * (1 - abar_prev) / (1 - abar_t)


def learned_range(o: Tensor, i: Index, chain: Chain) -> Tensor:
    """log Σ = v log β + (1-v) log β̃ with v = (o+1)/2 (ND eq. 15). o: the network's second half of channels, not
    bounded to [-1, 1]."""
    high, low = expand(chain.log_betas[i], o), expand(chain.log_variances["small"][i], o)
    v = (o + 1) / 2
    return v * high + (1 - v) * low


Predicts = Literal["eps", "x_0", "v", "previous_x"]
LearnedVariance = Literal["learned", "learned_range"]


def read(
    output: Tensor,
    x_t: Tensor,
    i: Index,
    chain: Chain,
    *,
    predicts: Predicts = "eps",
    variance: LearnedVariance | None = None,
) -> Prediction:
    """A network's raw output as a Prediction. output: 'b c ...', or 'b 2c ...' with a learned variance behind.

    "learned" is log Σ itself, "learned_range" goes through ND eq. 15; None leaves the choice to `p_mean_variance`.
    """
    if variance not in (None, "learned", "learned_range"):
        raise ValueError(f"unknown learned variance {variance!r}; known: None, learned, learned_range")
    channels = x_t.shape[1] * (1 if variance is None else 2)
    if output.shape[1] != channels:
        raise ValueError(f"the network gave {output.shape[1]} channels; with variance {variance!r} it is {channels}")
    # Under autocast the network's output is less precise than x_t; logarithms and differences are not taken there.
    output, o = output.to(x_t.dtype)[:, : x_t.shape[1]], output.to(x_t.dtype)[:, x_t.shape[1] :]
    log_variance = None if variance is None else o if variance == "learned" else learned_range(o, i, chain)
    schedule, t = chain.schedule, chain.t(i)
    if predicts not in ("eps", "x_0", "v", "previous_x"):
        raise ValueError(f"a network cannot predict {predicts!r}; known: eps, x_0, v, previous_x")
    if predicts == "previous_x":
        x_0 = x_0_from_mean(output, x_t, i, chain)
        return Prediction(schedule.eps_from_x_0(x_t, t, x_0), x_0, log_variance, mean=output)
    return replace(as_prediction(output, x_t, t, schedule, predicts), log_variance=log_variance)


def from_network(
    network: Network, chain: Chain, *, predicts: Predicts = "eps", variance: LearnedVariance | None = None
) -> Model:
    """The network as a sampler's model on the timesteps of this chain; `read` explains the two kinds."""
    return lambda x_t, t: read(network(x_t, t), x_t, chain.index(t), chain, predicts=predicts, variance=variance)


FixedVariance = Literal["small", "large"]


def p_mean_variance(
    prediction: Prediction, x_t: Tensor, i: Index, chain: Chain, *, variance: FixedVariance = "small"
) -> Gaussian:
    """p(x_{i-1} | x_i): the posterior at the predicted x_0 (Ho eq. 11).

    variance, where the prediction has none: "small" is β̃, right for one known x_0; "large" is β, right for
    x_0 ~ N(0, I) (Ho section 3.2); β̃_1 stands in for the first of either. To draw x_{i-1}, add exp(log_variance / 2)
    times noise to the mean; none at i = 0.
    """
    if variance not in chain.log_variances:
        raise ValueError(f"unknown fixed variance {variance!r}; known: {', '.join(chain.log_variances)}")
    mean, log_variance = prediction.mean, prediction.log_variance
    if mean is None:
        mean = posterior(prediction.x_0, x_t, i, chain).mean
    if log_variance is None:
        log_variance = expand(chain.log_variances[variance][i], x_t)
    return Gaussian(mean, log_variance)


def per_image(x: Tensor) -> Tensor:
    """The mean over everything but the batch, 'b'."""
    return x.mean(dim=tuple(range(1, x.ndim)))
