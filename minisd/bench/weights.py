"""Random models of a given size, written once for all contenders of a run."""

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


def write_random_folder(folder: Path, config: ModelConfig, networks: Collection[str] = WHOLE) -> None:
    """A diffusers folder with random float32 weights, which every contender can read; only of some networks at need."""
    unwanted = {NETWORKS[name].subfolder for name in WHOLE if name not in networks}
    for place, text in folder_files(config).items():
        if place.partition("/")[0] not in unwanted:
            (folder / place).parent.mkdir(parents=True, exist_ok=True)
            (folder / place).write_text(text, encoding="utf-8")
    for name in networks:
        network = on_meta(name, getattr(config, name))
        tensors = to_official(random_state(network), keymap(network, NETWORKS[name].folder_dialect))
        path = folder / NETWORKS[name].subfolder / f"{NETWORKS[name].weights}.safetensors"
        safetensors.torch.save_file(tensors, path, {"format": "pt"})


def random_state(network: nn.Module) -> dict[str, Tensor]:
    """Weights with which every layer passes a signal of about unit size on, so that outputs can be compared.

    All are stretches of one draw: as random to arithmetic as draws of their own, and made in a fraction of the time.
    """
    like = network.state_dict()
    draw = torch.randn(2 * max(tensor.numel() for tensor in like.values()), generator=torch.Generator().manual_seed(0))
    state, start = {}, 0
    for name, tensor in like.items():
        start = (start + 7919) % (len(draw) // 2)
        z = draw[start : start + tensor.numel()].view(tensor.shape)
        if tensor.ndim > 1:
            state[name] = z * 0.02 if "embedding" in name else z / tensor[0].numel() ** 0.5
        else:
            state[name] = 1 + 0.1 * z if name.endswith("weight") else 0.05 * z
    return state
