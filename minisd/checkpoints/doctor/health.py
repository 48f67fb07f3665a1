"""The doctor's longer examinations: every value of a file, and one forward of its U-Net."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from tqdm import tqdm

from minisd.checkpoints.files import CheckpointError, TensorFile
from minisd.models.unet import Conditioning, UNet

CHUNK = 1 << 22  # elements looked at at once
PROBE_THRESHOLD = -1.0


@dataclass
class Health:
    """What reading every tensor showed. nan, inf: how many values, by tensor; zero: weights that hold nothing but 0.

    checksums: files whose checksums match, of `files`; damage: the errors of those that do not.
    """

    files: int = 0
    tensors: int = 0
    checksums: int = 0
    damage: list[str] = field(default_factory=list)
    nan: dict[str, int] = field(default_factory=dict)
    inf: dict[str, int] = field(default_factory=dict)
    zero: list[str] = field(default_factory=list)


def examine(files: Iterable[TensorFile]) -> Health:
    """Read all of it. A bar appears on a terminal after two seconds."""
    health, files = Health(), list(files)
    total = sum(file.entry(name).nbytes for file in files for name in file)
    bar = tqdm(total=total, desc="verify", unit="B", unit_scale=True, delay=2, disable=None, leave=False)
    with bar:
        for file in files:
            health.files += 1
            try:
                health.checksums += file.verify()
            except CheckpointError as error:
                health.damage.append(str(error))
            for name in file:
                _look(health, name, file[name])
                bar.update(file.entry(name).nbytes)
    return health


def _look(health: Health, name: str, tensor: Tensor) -> None:
    health.tensors += 1
    if not tensor.is_floating_point() and not tensor.is_complex():
        return
    nan, inf, zero = 0, 0, True
    flat = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    for chunk in flat.reshape(-1).split(CHUNK):
        if not chunk.numel():
            continue
        # eight-bit floats have no comparisons of their own; one pass over the rest, a NaN is both least and greatest
        chunk = chunk.float() if chunk.dtype.itemsize == 1 else chunk
        least, greatest = (bound.item() for bound in chunk.aminmax())
        zero = zero and least == greatest == 0
        if not math.isfinite(least) or not math.isfinite(greatest):
            nan += int(chunk.isnan().sum())
            inf += int(chunk.isinf().sum())
    if nan:
        health.nan[name] = nan
    if inf:
        health.inf[name] = inf
    if tensor.numel() and zero and name.endswith("weight"):
        health.zero.append(name)


@torch.inference_mode()
def forward_probe(unet: UNet) -> float:
    """mean(unet(x) − x) at t = 999, everything that goes in 0.5: below −1 for v models, as AUTOMATIC1111 tells them.

    x is 'b 4 8 8' and the context two tokens; further input channels are 0, as stable-diffusion.cpp has them, and so
    is y. An ε model finds its constant input to be noise and gives it back; a v model answers −x̂₀, far from it.
    """
    config = unet.config
    x = torch.full((1, config.out_channels, 8, 8), 0.5)
    more = config.in_channels - config.out_channels
    y = torch.zeros(1, dtype=torch.long) if config.num_classes else None
    cond = Conditioning(
        context=torch.full((1, 2, config.context_dim), 0.5),
        y=torch.zeros(1, config.vector_dim) if config.vector_dim else y,
        concat=torch.zeros(1, more, *x.shape[2:]) if more > 0 else None,
    )
    return (unet(x, 999, cond) - x).double().mean().item()
