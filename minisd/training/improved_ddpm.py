"""How improved DDPM is trained and measured: L_simple, L_hybrid, L_vlb by importance sampling, and the whole bound.

Ho et al. 2020 is "Ho", Nichol & Dhariwal 2021 is "ND". The bound on the negative log-likelihood (Ho eq. 5) is

    L_vlb = KL(q(x_T|x_0) ‖ N(0, I)) + Σ KL(q(x_{t-1}|x_t,x_0) ‖ p(x_{t-1}|x_t)) - log p(x_0|x_1)
            `prior_term`               `vlb_term`, with q from `posterior` and p from `p_mean_variance`

in bits per dimension, one per image. Losses are one per image too: average them, or multiply them with the weights of
`LossSecondMoment` first.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from minisd.diffusion.gaussian import (
    Chain,
    FixedVariance,
    Gaussian,
    Index,
    LearnedVariance,
    Predicts,
    p_mean_variance,
    per_image,
    posterior,
    read,
)
from minisd.diffusion.prediction import Model, Network, Prediction, as_prediction
from minisd.diffusion.schedule import expand


@dataclass(frozen=True)
class HybridLoss:
    """loss = simple + λ n vlb, each 'b'; vlb is the term of one random step, in bits per dimension."""

    loss: Tensor
    simple: Tensor
    vlb: Tensor


def hybrid_loss(
    network: Network,
    x_0: Tensor,
    i: Tensor,
    chain: Chain,
    noise: Tensor,
    *,
    predicts: Predicts = "eps",
    variance: LearnedVariance = "learned_range",
    weight: float = 0.001,
) -> HybridLoss:
    """L_hybrid = L_simple + λ L_vlb with λ = weight (Ho eq. 14, ND eq. 16), for a network that learns its variance.

    i: LongTensor 'b', uniform in [0, n): n · vlb is then an unbiased L_vlb. Only L_simple teaches the mean.
    """
    x_t = chain.q_sample(x_0, i, noise)
    output = network(x_t, torch.as_tensor(chain.t(i), device=x_t.device))
    target = training_target(x_0, x_t, i, chain, noise, predicts=predicts)
    prediction = read(output, x_t, i, chain, predicts=predicts, variance=variance)
    mean = p_mean_variance(prediction, x_t, i, chain).mean.detach()
    simple = per_image((output[:, : x_0.shape[1]] - target) ** 2)
    vlb = vlb_term(replace(prediction, mean=mean), x_0, x_t, i, chain)
    return HybridLoss(simple + weight * len(chain) * vlb, simple, vlb)


def vlb_loss(
    network: Network,
    x_0: Tensor,
    i: Tensor,
    chain: Chain,
    noise: Tensor,
    *,
    predicts: Predicts = "eps",
    variance: LearnedVariance | None = "learned_range",
) -> Tensor:
    """n times the bound's term at step i, bits per dimension, 'b': its mean over uniform i is L_vlb (Ho eq. 5).

    Noisy over i, so meant for `LossSecondMoment`. Mean and variance are both taught; variance None fixes it at β̃.
    """
    x_t = chain.q_sample(x_0, i, noise)
    output = network(x_t, torch.as_tensor(chain.t(i), device=x_t.device))
    prediction = read(output, x_t, i, chain, predicts=predicts, variance=variance)
    return len(chain) * vlb_term(prediction, x_0, x_t, i, chain)


def training_target(
    x_0: Tensor, x_t: Tensor, i: Index, chain: Chain, noise: Tensor, *, predicts: Predicts = "eps"
) -> Tensor:
    """What a network that `predicts` this should return for x_t = chain.q_sample(x_0, i, noise)."""
    match predicts:
        case "eps":
            return noise
        case "x_0":
            return x_0
        case "v":
            return chain.schedule.v_target(x_0, chain.t(i), noise)
        case "previous_x":
            return posterior(x_0, x_t, i, chain).mean
    raise ValueError(f"a network cannot predict {predicts!r}; known: eps, x_0, v, previous_x")


class LossSecondMoment:
    """Importance sampling of steps for L_vlb: p_i ∝ √E[L_i²] over the last losses of each step (ND eq. 18).

    n: steps of the chain. Until every step has `history` losses, and with probability `uniform` ever after, steps are
    drawn uniformly. The state is `losses` ('n history', oldest first) and `counts` ('n'): save and restore both.
    """

    def __init__(self, n: int, *, history: int = 10, uniform: float = 0.001):
        self.losses = torch.zeros(n, history, dtype=torch.float64)
        self.counts = torch.zeros(n, dtype=torch.int64)
        self.uniform = uniform

    def probabilities(self) -> Tensor:
        """p_i, float64 'n'."""
        n, history = self.losses.shape
        if (self.counts < history).any():
            return self.losses.new_full((n,), 1 / n)
        p = self.losses.square().mean(dim=1).sqrt()
        return (1 - self.uniform) * p / p.sum() + self.uniform / n

    def sample(self, b: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Steps i, LongTensor 'b', and the weights 1/(n p_i), 'b', that keep the mean of weight · loss unbiased."""
        p = self.probabilities()
        i = torch.multinomial(p, b, replacement=True, generator=generator)
        return i, (1 / (len(p) * p[i])).float()

    def update(self, i: Tensor, losses: Tensor) -> None:
        """Remember the unweighted losses, 'b', that were seen at steps i."""
        for step, loss in zip(i.tolist(), losses.detach().double().cpu(), strict=True):
            self.losses[step] = torch.cat([self.losses[step, 1:], loss.reshape(1)])
            self.counts[step] += 1


# The bound, from the inside out


def kl(q: Gaussian, p: Gaussian) -> Tensor:
    """KL(q ‖ p) of every element, in nats."""
    shift = (q.mean - p.mean) ** 2 * (-p.log_variance).exp()
    return 0.5 * (-1 + p.log_variance - q.log_variance + (q.log_variance - p.log_variance).exp() + shift)


def standard_normal_cdf(x: Tensor) -> Tensor:
    """Φ(x) to 3e-4, as improved DDPM approximates it: published bits per dimension rest on it."""
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def discretized_log_likelihood(x_0: Tensor, p: Gaussian) -> Tensor:
    """log p of every element of an 8-bit image, in nats (Ho eq. 13). x_0: 256 levels in [-1, 1].

    The bins are ±1/255 wide; the first and the last are open to -∞ and ∞. Probabilities are kept above 1e-12.
    """
    centered, inverse_std = x_0 - p.mean, (-0.5 * p.log_variance).exp()
    below = standard_normal_cdf((centered - 1 / 255) * inverse_std)
    above = standard_normal_cdf((centered + 1 / 255) * inverse_std)
    probability = torch.where(x_0 < -0.999, above, torch.where(x_0 > 0.999, 1 - below, above - below))
    return probability.clamp(min=1e-12).log()


def vlb_term(
    prediction: Prediction, x_0: Tensor, x_t: Tensor, i: Index, chain: Chain, *, variance: FixedVariance = "small"
) -> Tensor:
    """L_{i-1} of Ho eq. 5, bits per dimension, 'b': a KL for i > 0, at i = 0 the decoder's negative log-likelihood."""
    p = p_mean_variance(prediction, x_t, i, chain, variance=variance)
    divergence = kl(posterior(x_0, x_t, i, chain), p)
    decoder = -discretized_log_likelihood(x_0, p)
    return bits_per_dim(torch.where(expand(torch.as_tensor(i), x_0) == 0, decoder, divergence))


def prior_term(x_0: Tensor, chain: Chain) -> Tensor:
    """L_T of Ho eq. 5, bits per dimension, 'b': what x_T still knows of x_0. Nothing in it can be trained."""
    abar, standard = chain.alphas_cumprod[-1], Gaussian(torch.zeros(()), torch.zeros(()))
    return bits_per_dim(kl(Gaussian(expand(abar.sqrt(), x_0) * x_0, expand((1 - abar).log(), x_0)), standard))


@dataclass(frozen=True)
class Bound:
    """A bound on -log p(x_0) in bits per dimension: total = prior + the sum of vlb over the chain.

    total, prior: 'b'. vlb, and the mean square errors of the model's x_0 and ε: 'b n', by step i.
    """

    total: Tensor
    prior: Tensor
    vlb: Tensor
    x_0_mse: Tensor
    eps_mse: Tensor


@torch.no_grad()
def variational_bound(
    model: Model,
    x_0: Tensor,
    chain: Chain,
    *,
    noise: Callable[[Tensor], Tensor] = torch.randn_like,
    variance: FixedVariance = "small",
) -> Bound:
    """All of Ho eq. 5, by one draw of x_i ~ q(x_i | x_0) for every step, from the noisiest down.

    x_0: 8-bit pixels in [-1, 1], so the model is usually `clipped`. noise(x_0) draws the next ε.
    """
    terms = []
    for i in reversed(range(len(chain))):
        eps = noise(x_0)
        x_t = chain.q_sample(x_0, i, eps)
        prediction = as_prediction(model(x_t, chain.t(i)), x_t, chain.t(i), chain.schedule)
        vlb = vlb_term(prediction, x_0, x_t, i, chain, variance=variance)
        terms.append((vlb, per_image((prediction.x_0 - x_0) ** 2), per_image((prediction.eps - eps) ** 2)))
    vlb, x_0_mse, eps_mse = (torch.stack(term[::-1], dim=1) for term in zip(*terms, strict=True))
    prior = prior_term(x_0, chain)
    return Bound(prior + vlb.sum(dim=1), prior, vlb, x_0_mse, eps_mse)


def bits_per_dim(nats: Tensor) -> Tensor:
    """Elementwise nats as bits per dimension, 'b'."""
    return per_image(nats) / math.log(2)
