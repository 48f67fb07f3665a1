"""How improved DDPM is trained: L_simple, L_hybrid, and L_vlb by importance sampling (Nichol & Dhariwal 2021, "ND").

Losses are one per image: average them, or multiply them with the weights of `LossSecondMoment` first.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from minisd.diffusion.gaussian import (
    Chain,
    Index,
    LearnedVariance,
    Predicts,
    p_mean_variance,
    per_image,
    posterior,
    read,
    vlb_term,
)
from minisd.diffusion.prediction import Network


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
    output = network(x_t, chain.t(i).to(x_t.device))
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
    output = network(x_t, chain.t(i).to(x_t.device))
    prediction = read(output, x_t, i, chain, predicts=predicts, variance=variance)
    return len(chain) * vlb_term(prediction, x_0, x_t, i, chain)


def training_target(
    x_0: Tensor, x_t: Tensor, i: Index, chain: Chain, noise: Tensor, *, predicts: Predicts = "eps"
) -> Tensor:
    """What a network that `predicts` this should return for x_t = chain.q_sample(x_0, i, noise)."""
    if predicts == "previous_x":
        return posterior(x_0, x_t, i, chain).mean
    return chain.schedule.target(x_0, chain.t(i), noise, predicts)


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
