"""NaN and infinity: which layer gave them first, and what to do about it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


class NonFiniteError(ValueError):
    """A network gave NaN or infinity. The message names the first layer that did."""


def nonfinite_error(name: str, network: nn.Module, run: Callable[[], object], when: str = "") -> NonFiniteError:
    """The error to raise for a network called `name`; `run` calls it once more, on what it failed on."""
    problem = f"the {name} gave NaN or infinity{when and ' '}{when}"
    layer = first_nonfinite_layer(network, run)
    if layer is None:
        return NonFiniteError(
            f"{problem}, but no layer of it does when it runs again: look at the sampler, or at what wraps the network"
        )
    module = network.get_submodule(layer)
    dtype = next((p.dtype for p in module.parameters()), torch.float32)
    if not all(p.isfinite().all() for p in module.parameters()):
        why = "whose weights hold it: the file is damaged, `minisd inspect --verify` lists such tensors"
    elif dtype == torch.float16:
        why = "in float16, which ends at 65504: load with dtype=torch.bfloat16 or torch.float32"
    elif dtype == torch.bfloat16:
        why = "in bfloat16: load with dtype=torch.float32"
    else:
        why = "though its weights are finite: is guidance_scale very large, or the model one of another kind?"
    return NonFiniteError(f"{problem}, first in the layer {layer}, {why}")


def first_nonfinite_layer(network: nn.Module, run: Callable[[], object]) -> str | None:
    """The name of the first layer whose output is not finite while `run` calls the network; None if all are."""
    names: list[str] = []

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: object, output: object) -> None:
            if not names and isinstance(output, Tensor) and not output.isfinite().all():
                names.append(name)

        return hook

    layers = [(name, module) for name, module in network.named_modules() if not list(module.children())]
    handles = [module.register_forward_hook(watch(name)) for name, module in layers]
    try:
        with torch.no_grad():
            run()
    finally:
        for handle in handles:
            handle.remove()
    return names[0] if names else None
