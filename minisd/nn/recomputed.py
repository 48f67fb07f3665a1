"""Less memory for a little time: what is cheap to compute is computed again when its gradient is due."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

LARGE = 2**19  # numbers: of smaller tensors the bookkeeping took a tenth of a step of the mini model, for few megabytes


def recomputed(function: Callable[..., Tensor], *inputs: object) -> Tensor:
    """function(*inputs), of whose inside autograd keeps nothing (gradient checkpointing, Chen et al. 2016).

    The numbers are the same. For activations and norms, whose insides are as large as their inputs, where these are
    LARGE: the peak of LoRA on Stable Diffusion, one picture of 512 x 512 in float32, fell from 6.5 to 6.3 GB. A module
    among the inputs is called a second time in the backward pass, hooks and all, and must have its weights still.
    torch.func, which cannot do this, keeps everything.
    """
    learns = any(isinstance(x, Tensor) and x.requires_grad and x.numel() >= LARGE for x in inputs)
    if not learns or not torch.is_grad_enabled() or torch._C._are_functorch_transforms_active():
        return function(*inputs)
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)
