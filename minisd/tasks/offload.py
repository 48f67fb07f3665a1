"""Sequential offload: networks that would not fit on a device together run there one at a time."""

from __future__ import annotations

from itertools import chain

import torch
from torch import Tensor, nn


class Offload:
    """The network that runs has a copy of its weights on the device; those of all others lie in CPU memory alone.

    The weights in CPU memory are never written to: leaving the device only drops the copies. What changes weights
    (adapters, saving) has to call `rest` first.
    """

    def __init__(self, device: str | torch.device):
        self.device = torch.device(device)
        self._there: nn.Module | None = None
        self._kept: list[tuple[Tensor, Tensor]] = []

    def bring(self, network: nn.Module) -> None:
        """Let this network, and no other, be on the device."""
        if network is self._there:
            return
        self.rest()
        self._there = network
        self._kept = [(tensor, tensor.data) for tensor in chain(network.parameters(), network.buffers())]
        for tensor, weights in self._kept:
            tensor.data = weights.to(self.device, copy=True)

    def rest(self) -> None:
        """Let no network be on the device."""
        for tensor, weights in self._kept:
            tensor.data = weights
        self._there, self._kept = None, []
