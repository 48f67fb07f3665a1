"""Networks without memory for their weights, nor time spent on drawing them: to be filled from a file, or measured."""

from __future__ import annotations

import torch
from torch import nn
from torch.overrides import TorchFunctionMode


def on_meta(module: type[nn.Module], config) -> nn.Module:
    """module(config) on PyTorch's "meta" device."""
    with _Undrawn():
        return module(config)


class _Undrawn(TorchFunctionMode):
    """Makes tensors on the meta device, and leaves out torch.nn.init, in this thread.

    On meta its draws compute nothing, yet import torch's compiler (2 s). One mode for both: every call passes through.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.empty:
            return func(*args, **{**kwargs, "device": "meta"})
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)
