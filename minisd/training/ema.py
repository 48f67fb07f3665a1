"""The moving average of the weights, which is what one samples from."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


class EMA:
    """average ← d·average + (1-d)·weight after every step, with d = min(decay, (1+n)/(10+n)) after n updates.

    The warm-up is CompVis' (`LitEma`): without it the average would be of the random start for the first 1/(1-decay)
    steps. decay None keeps no average, and `applied` changes nothing.
    """

    def __init__(self, networks: nn.Module, decay: float | None):
        if decay is not None and not 0 <= decay < 1:
            raise ValueError(f"EMA decay {decay} is not in [0, 1): give 0.999 or 0.9999, or None for no average")
        self.decay = decay
        self.weights = {} if decay is None else {n: p for n, p in networks.named_parameters() if p.requires_grad}
        self.averages = {name: weight.detach().clone() for name, weight in self.weights.items()}

    @torch.no_grad()
    def update(self, n: int) -> None:
        """Take in the weights after the n-th step, n from 1."""
        if self.decay is not None:
            share = 1 - min(self.decay, (1 + n) / (10 + n))
            # one call for all tensors: on a GPU hundreds of small ones would cost more than a small model's step
            torch._foreach_lerp_(list(self.averages.values()), [w.detach() for w in self.weights.values()], share)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The networks hold the averages inside the block, and their own weights again after it."""
        self.swap()
        try:
            yield
        finally:
            self.swap()

    def swap(self) -> None:
        """Exchange averages and weights."""
        for name, weight in self.weights.items():
            weight.data, self.averages[name].data = self.averages[name].data, weight.data
