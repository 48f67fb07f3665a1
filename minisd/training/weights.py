"""New weights and what a recipe does with whole networks: seeds, recomputation instead of memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from minisd.training.draws import generator


@contextmanager
def seeded(*key: object) -> Iterator[None]:
    """Networks built inside have the weights of this key; PyTorch's global generator is as before afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator(*key).initial_seed())
        yield


def recompute(blocks: Iterable[nn.Module]) -> None:
    """Gradient checkpointing (Chen et al. 2016): keep the blocks' inputs only, and run each again when its gradient is
    due. A third more work; the same numbers. It shadows `forward` on these instances; weights and names stay.
    """
    for block in blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
