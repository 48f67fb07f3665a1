"""Sequential offload: networks that would not fit on a device together run there one at a time."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain

import torch
from torch import Tensor, nn


class Offload:
    """The network that runs has a copy of its weights on the device; those of all others lie in CPU memory alone.

    A hook on every layer that has weights brings its network there before it runs; whoever runs them need not know. The
    weights in CPU memory are never written to: leaving the device only drops the copies. What changes weights
    (adapters, saving) has to call `unload` first. Where a copy fails, memory being full, all are dropped.
    """

    def __init__(self, device: str | torch.device, networks: Iterable[nn.Module]):
        self.device = torch.device(device)
        self._loaded: nn.Module | None = None
        self._kept: list[tuple[Tensor, Tensor]] = []
        for network in networks:
            for layer in network.modules():
                if list(layer.parameters(recurse=False)):
                    layer.register_forward_pre_hook(lambda *_, network=network: self.load(network))

    def load(self, network: nn.Module) -> None:
        """Let this network, and no other, be on the device."""
        if network is self._loaded:
            return
        self.unload()
        self._kept = [(tensor, tensor.data) for tensor in chain(network.parameters(), network.buffers())]
        try:
            for tensor, weights in self._kept:
                tensor.data = weights.to(self.device, copy=True)
        except BaseException:
            self.unload()
            raise
        self._loaded = network

    def unload(self) -> None:
        """Let no network be on the device."""
        for tensor, weights in self._kept:
            tensor.data = weights
        self._loaded, self._kept = None, []


def check_device(device: torch.device) -> None:
    """ValueError where the weights lie on the device already."""
    if device.type == "cpu":
        raise ValueError("offload keeps networks in CPU memory until they run on another device: give it, such as cuda")
