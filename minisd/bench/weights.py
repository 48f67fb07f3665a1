"""Random models of a given size, written once for all contenders."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

from minisd.checkpoints.building import on_meta
from minisd.checkpoints.diffusers_write import folder_files
from minisd.checkpoints.keymaps import keymap, to_official
from minisd.checkpoints.networks import NETWORKS
from minisd.config import ModelConfig

WHOLE = ("unet", "vae", "text")
STRIDE = 7919  # a prime, between the starts of two weights' slices


def write_random_folder(folder: Path, config: ModelConfig, networks: Collection[str] = WHOLE) -> None:
    """A diffusers folder with random float32 weights, which every contender can read; only of some networks at need."""
    unwanted = {NETWORKS[name].subfolder for name in WHOLE if name not in networks}
    for file, text in folder_files(config).items():
        if file.partition("/")[0] not in unwanted:
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).write_text(text, encoding="utf-8")
    for name in networks:
        network = on_meta(name, getattr(config, name))
        tensors = to_official(random_state(network), keymap(network, NETWORKS[name].folder_dialect))
        path = folder / NETWORKS[name].subfolder / f"{NETWORKS[name].weights}.safetensors"
        safetensors.torch.save_file(tensors, path, {"format": "pt"})


def random_state(network: nn.Module) -> dict[str, Tensor]:
    """Weights by which every layer keeps its signal at about unit variance, so that outputs can be compared.

    All are slices of one draw, which takes a fraction of the time of as many draws.
    """
    shapes = network.state_dict()
    normal = torch.randn(2 * max(map(Tensor.numel, shapes.values())), generator=torch.Generator().manual_seed(0))
    state, start = {}, 0
    for name, tensor in shapes.items():
        start = (start + STRIDE) % (len(normal) // 2)
        z = normal[start : start + tensor.numel()].view(tensor.shape)
        if tensor.ndim > 1:
            state[name] = z * 0.02 if "embedding" in name else z / tensor[0].numel() ** 0.5
        else:
            state[name] = 1 + 0.1 * z if name.endswith("weight") else 0.05 * z
    return state
