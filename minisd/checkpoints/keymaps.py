"""Official tensor names ↔ ours. The map is generated from the topology that builds the network (`NetworkFormat.names`).

A key map says for each of our tensors where it stands in a file. Dialects: "ldm" (the original's single files) and
"diffusers" for U-Net, VAE and ControlNet; "hf" (Hugging Face) and "openclip" (packed in_proj) for the CLIP towers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from minisd.checkpoints.networks import NETWORKS
from minisd.checkpoints.networks.format import KeyMap, Source

__all__ = ["KeyMap", "Source", "from_official", "keymap", "to_official"]


def keymap(network: nn.Module, dialect: str) -> KeyMap:
    """Our tensor names of a network → where they stand in a file of that dialect (names without a file's prefix)."""
    declared = next(declared for declared in NETWORKS.values() if isinstance(network, declared.module))
    names = dict(declared.names(declared.config_of(network), dialect))
    result = {}
    for name in network.state_dict():
        module, _, leaf = name.rpartition(".")
        official = names.get(name) or names[module]
        result[name] = official if isinstance(official, Source) else Source(f"{official}.{leaf}")
    return result


def from_official(tensors: Callable[[str], Tensor], names: KeyMap) -> dict[str, Tensor]:
    """Our state dict from a file's tensors: views only, nothing is copied."""
    state, packed = {}, {}
    for name, source in names.items():
        if source.third is None:
            tensor = tensors(source.key)
        else:  # read once for its three
            tensor = packed[source.key] if source.key in packed else packed.setdefault(source.key, tensors(source.key))
            tensor = tensor.chunk(3)[source.third]
        if source.transposed:
            tensor = tensor.T
        if source.linear:
            tensor = tensor[:, :, None, None]
        state[name] = tensor
    return state


def to_official(state: Mapping[str, Tensor], names: KeyMap) -> dict[str, Tensor]:
    """The file's tensors from our state dict: the inverse of `from_official`, bit for bit."""
    tensors, thirds = {}, {}
    for name, source in names.items():
        tensor = state[name]
        if source.linear:
            tensor = tensor[:, :, 0, 0]
        if source.transposed:
            tensor = tensor.T
        if source.third is None:
            tensors[source.key] = tensor
        else:
            thirds.setdefault(source.key, [None] * 3)[source.third] = tensor
    return tensors | {key: torch.cat(parts) for key, parts in thirds.items()}
