"""What recipes do with whole networks: seeds, copies that learn, recomputation instead of memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from minisd.nn.tuning import channels_last, forget_file_pages
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
    half = half and not learn
    if not (learn or half):
        channels_last(network)  # here, or the copy would hold the convolutions a second time
    matrices = {id(m.weight) for m in network.modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    memo = {}
    for weight in network.parameters():
        dtype = torch.bfloat16 if half and id(weight) in matrices else torch.promote_types(weight.dtype, torch.float32)
        own = weight.detach().to(dtype, copy=learn)
        if weight.ndim == 4 and weight.device.type == "cpu":
            own = own.contiguous(memory_format=torch.channels_last)  # as `tune` wants it, by a second copy
        if own.data_ptr() != weight.data_ptr():
            forget_file_pages(weight.detach())
        memo[id(weight)] = nn.Parameter(own, requires_grad=learn)
    return deepcopy(network, memo)


def recompute(blocks: Iterable[nn.Module]) -> None:
    """Gradient checkpointing (Chen et al. 2016): keep the blocks' inputs only, and run each again when its gradient is
    due. A third more work; the same numbers. It shadows `forward` on these instances; weights and names stay.
    """
    for block in blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
