"""What recipes do with whole networks: seeds, copies that learn, recomputation instead of memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from minisd.runtime.allocator import forget_file_pages
from minisd.runtime.optimize import channels_last
from minisd.training.draws import generator


@contextmanager
def seeded(*key: object) -> Iterator[None]:
    """Networks built inside have the weights of this key; PyTorch's global generator is as before afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator(*key).initial_seed())
        yield


def copied(network: nn.Module, *, learn: bool, half: bool = False) -> nn.Module:
    """A copy that learns, or a frozen one that shares the weights of the network wherever their dtype stays.

    Weights become float32 (float64 stays), the dtype that AdamW needs to add small steps. half: of a frozen network the
    matrices and kernels become bfloat16, to which autocast would round them at each use: the same numbers in half of
    the memory.
    """
    layers = {id(m.weight): m for m in network.modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    memo = {}
    for weight in network.parameters():
        layer = layers.get(id(weight))
        dtype = torch.promote_types(weight.dtype, torch.float32)
        if half and not learn and layer is not None:
            dtype = torch.bfloat16
        if not learn and dtype == weight.dtype:
            if layer is not None:
                channels_last(layer)  # here, or the copy would hold a convolution a second time
            own = weight.detach()
        else:
            kernel = isinstance(layer, nn.Conv2d) and weight.device.type == "cpu"
            layout = torch.channels_last if kernel else torch.preserve_format  # as `lay_out` wants it
            own = torch.empty_like(weight.detach(), dtype=dtype, memory_format=layout).copy_(weight.detach())
            forget_file_pages(weight.detach())
        memo[id(weight)] = nn.Parameter(own, requires_grad=learn)
    return deepcopy(network, memo)


def recompute(blocks: Iterable[nn.Module]) -> None:
    """Gradient checkpointing (Chen et al. 2016): keep the blocks' inputs only, and run each again when its gradient is
    due. A third more work; the same numbers. It shadows `forward` on these instances; weights and names stay.
    """
    for block in blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
