"""The doctor's longer examinations: every value of a file, and one forward of its U-Net."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from tqdm import tqdm

from minisd.checkpoints.doctor.inspection import Inspection, few
from minisd.checkpoints.files import CheckpointError, TensorFile
from minisd.models.unet import Conditioning, UNet

CHUNK = 1 << 22  # elements looked at at once
PROBE_THRESHOLD = -1.0


def examine(inspection: Inspection, files: list[TensorFile]) -> None:
    """Read all of it for checksums and odd values. A bar appears on a terminal after two seconds."""
    total = sum(file.entry(name).nbytes for file in files for name in file)
    checksums, damaged, tensors, zero, odd = 0, False, 0, [], {"NaN": {}, "Inf": {}}
    with tqdm(total=total, desc="verify", unit="B", unit_scale=True, delay=2, disable=None, leave=False) as bar:
        for file in files:
            try:
                checksums += file.verify()
            except CheckpointError as error:
                damaged = True
                inspection.problems.append(str(error))
            for name in file:
                nan, inf, is_zero = _odd_values(file[name])
                odd["NaN"] |= {name: nan} if nan else {}
                odd["Inf"] |= {name: inf} if inf else {}
                zero += [name] if is_zero and name.endswith("weight") else []
                tensors += 1
                bar.update(file.entry(name).nbytes)
    if checksums:
        inspection.facts["checksums"] = "match" + (f" in {checksums} of {len(files)} files" if len(files) > 1 else "")
    elif not damaged:
        inspection.facts["checksums"] = "none in it (torch's zip files have them, and what minisd saves)"
    for what, counts in odd.items():
        if counts:
            names = few(f"{name} ({count:,})" for name, count in counts.items())
            inspection.problems.append(f"{len(counts)} tensors hold {what}: {names}")
    if not any(odd.values()):
        inspection.facts["values"] = f"all {tensors:,} tensors were read: no NaN, no Inf"
    if zero:
        inspection.notes.append(f"{len(zero)} weights hold nothing but 0, an untrained layer? {few(zero)}")


def _odd_values(tensor: Tensor) -> tuple[int, int, bool]:
    """How many are NaN, how many infinite, and whether all of them, one at least, are 0."""
    if not tensor.is_floating_point() and not tensor.is_complex():
        return 0, 0, False
    nan, inf, zero = 0, 0, tensor.numel() > 0
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
    return nan, inf, zero


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
