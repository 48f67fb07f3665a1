"""What PyTorch is doing around a call, which decides what may run in it."""

from __future__ import annotations

import torch
from torch import Tensor


def needs_gradient(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def is_transformed() -> bool:
    """Whether this is being compiled or traced, or mapped by torch.func: plain operators only, each with a result."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing() or torch._C._are_functorch_transforms_active()
