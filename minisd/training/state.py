"""The state of a training as one file: what is learnt, averages, the optimiser's moments, the step. Whole or absent.

Written beside and renamed, so that a kill or a full disk leaves the state before it. There is no random state in it:
`draws` derives all chance from the step.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from minisd.checkpoints.files import CheckpointError, open_tensors, save_safetensors
from minisd.training.ema import EMA
from minisd.training.options import renamed

KEY = "minisd_training"  # in the metadata: the step, and the settings that made the state


def save_state(
    path: str | os.PathLike,
    step: int,
    networks: nn.Module,
    optimizers: Sequence[Optimizer],
    ema: EMA,
    settings: dict,
) -> None:
    """Write the state after `step` steps. OSError where the disk is full: the file before stays."""
    tensors = {f"networks.{name}": weight.detach() for name, weight in learnt_weights(networks).items()}
    tensors |= {f"averages.{name}": tensor for name, tensor in ema.averages.items()}
    for optimizer in optimizers:
        for name, moments in _moments(networks, optimizer):
            tensors |= {f"optimizer.{key}.{name}": tensor for key, tensor in moments.items()}
    save_safetensors(path, tensors, {KEY: json.dumps({"step": step, "settings": settings}, sort_keys=True)})


def load_state(
    path: str | os.PathLike, networks: nn.Module, optimizers: Sequence[Optimizer], ema: EMA, settings: dict
) -> int:
    """Take up the state of a file, in place, and return its step; 0 where there is none.

    ValueError where other settings made it: a training that changes on its way can not be told or repeated.
    """
    path = Path(path)
    if not path.exists():
        return 0
    file = open_tensors(path)
    if KEY not in file.metadata:
        raise CheckpointError(f"{path}: it is no state of a training: remove it, or train into another folder")
    file.verify()
    metadata = json.loads(file.metadata[KEY])
    if differences := differing(renamed(metadata["settings"]), json.loads(json.dumps(settings))):
        raise ValueError(
            f"{path} is of another training: {'; '.join(differences[:5])}. Give the old values to go on with it, or "
            "another folder to start anew"
        )

    def under(prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): file.read(name) for name in file if name.startswith(prefix)}

    take_weights(networks, under("networks."), path)
    for name, average in under("averages.").items():
        ema.averages[name].copy_(average)
    named = {p: name for name, p in networks.named_parameters()}
    moments: dict[str, dict[str, Tensor]] = {}
    for key, tensor in under("optimizer.").items():
        key, _, name = key.partition(".")
        moments.setdefault(name, {})[key] = tensor

    def laid_out(tensor: Tensor, like: Tensor) -> Tensor:
        """In memory as the weight is: AdamW's fused form reads both in that order."""
        return tensor if tensor.shape != like.shape else torch.empty_like(like, dtype=tensor.dtype).copy_(tensor)

    for optimizer in optimizers:
        weights = [p for group in optimizer.param_groups for p in group["params"]]
        state = {
            i: {key: laid_out(tensor, weight) for key, tensor in moments[named[weight]].items()}
            for i, weight in enumerate(weights)
            if named[weight] in moments
        }
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return metadata["step"]


def learnt_weights(networks: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that a training moves, by name; frozen ones are somebody else's to keep."""
    return {name: weight for name, weight in networks.named_parameters() if weight.requires_grad}


@torch.no_grad()
def take_weights(networks: nn.Module, tensors: Mapping[str, Tensor], path: str | os.PathLike) -> None:
    """Copy tensors into the learnt weights of these names. ValueError where names or shapes do not match."""
    weights = learnt_weights(networks)
    shapes = [{name: tuple(t.shape) for name, t in side.items()} for side in (weights, tensors)]
    if lines := differing(*shapes):
        raise ValueError(f"{path} holds weights of other networks: {'; '.join(lines[:3])}")
    for name, weight in weights.items():
        weight.copy_(tensors[name])


def _moments(networks: nn.Module, optimizer: Optimizer) -> Iterator[tuple[str, dict[str, Tensor]]]:
    for name, parameter in networks.named_parameters():
        if parameter in optimizer.state:
            yield name, optimizer.state[parameter]


def differing(old: Any, new: Any, where: str = "") -> list[str]:
    """What two nests of plain values disagree on, a line each: "loop.lr was 0.001, is 0.01"."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        names = sorted(old.keys() | new.keys())
        below = (differing(old.get(n), new.get(n), f"{where}.{n}" if where else n) for n in names)
        return [line for lines in below for line in lines]
    return [] if old == new else [f"{where} was {_said(old)}, is {_said(new)}"]


def _said(value: Any) -> str:
    return "absent" if value is None else json.dumps(value)
