"""LoRA (Hu et al. 2021): changes of low rank to the weights of linear layers and convolutions.

In memory a LoRA is a plain mapping from a layer, "unet." or "text." and our path in that network, to its `LowRank`.
`load_lora` and `save_lora` move it from and to files, `MergedLoras` puts it into the weights and takes it out again.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from minisd.checkpoints.families import other_family
from minisd.checkpoints.files import CheckpointError, TensorFile, open_tensors, save_safetensors
from minisd.checkpoints.foreign import lora_base, lycoris_kinds
from minisd.checkpoints.lora_files import (
    Pair,
    flat_name,
    names_from_official,
    names_to_official,
    pairs_in,
    peft_alpha,
    peft_config,
    text_width,
)


@dataclass(frozen=True)
class LowRank:
    """The change of one layer's weight: alpha/rank · up·down.

    down: 'r in' of a linear layer, 'r in h w' of a convolution; up: 'out r' or 'out r 1 1'.
    """

    down: Tensor
    up: Tensor
    alpha: float

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def delta(self) -> Tensor:
        """The change 'out in' or 'out in h w', computed in float32 (float64 matrices: in float64)."""
        dtype = wide(self.down.dtype)
        up, down = self.up.detach().to(dtype).flatten(1), self.down.detach().to(dtype)
        return self.scale * torch.einsum("o r, r ... -> o ...", up, down)


Lora = Mapping[str, LowRank]
Networks = Mapping[str, nn.Module]  # "unet" and "text", as in a Checkpoint


def wide(dtype: torch.dtype) -> torch.dtype:
    """What a weight is added up in: float32, or float64 where it is that."""
    return torch.float64 if dtype == torch.float64 else torch.float32


# ------------------------------------------------------------------------------------------------------------- merging


class MergedLoras:
    """LoRAs in the weights of the networks, by name, and the originals that undo them.

    A weight with LoRAs is original + Σ weight·delta, added up in float32 from the kept original and rounded once:
    how often it was done leaves no trace, and its order only in float32's last bit. Parameters stay the objects they
    are; their tensors are replaced, never written into, so that mapped files and other holders of the originals see
    nothing.
    """

    def __init__(self, networks: Networks):
        self.networks = networks
        self.loras: dict[str, tuple[Lora, float]] = {}
        self.originals: dict[str, Tensor] = {}

    def merge(self, name: str, lora: Lora, weight: float = 1.0) -> None:
        """Put a LoRA in at a weight; one of the same name gives way to it. On an error nothing has changed."""
        if not math.isfinite(weight):
            raise ValueError(f"the weight of a LoRA is {weight}: give a finite number, usually 0 to 1")
        before, _ = self.loras.get(name, ({}, 0.0))
        self._apply(self.loras | {name: (lora, weight)}, {**before, **lora})

    def unmerge(self) -> None:
        """Put the originals back, bit for bit; nothing to do where no LoRA is in."""
        self._apply({}, dict.fromkeys(self.originals))

    @torch.no_grad()
    def _apply(self, loras: dict[str, tuple[Lora, float]], layers: Mapping) -> None:
        merged = {}
        for layer in layers:
            parameter = layer_of(self.networks, layer).weight
            original = self.originals.get(layer, parameter.data)
            parts = [(lora[layer], weight) for lora, weight in loras.values() if layer in lora]
            merged[layer] = _changed(original.to(parameter), parts)
        for layer, tensor in merged.items():
            parameter = layer_of(self.networks, layer).weight
            self.originals.setdefault(layer, parameter.data)
            parameter.data = tensor
        self.loras = loras
        held = {layer for lora, _ in loras.values() for layer in lora}
        self.originals = {layer: tensor for layer, tensor in self.originals.items() if layer in held}


def _changed(original: Tensor, parts: list[tuple[LowRank, float]]) -> Tensor:
    if not any(weight for _, weight in parts):
        return original
    total = original.to(wide(original.dtype))
    for low_rank, weight in parts:
        change = weight * low_rank.delta().to(total.device)
        total = total + change.reshape(total.shape)
    return total.to(original.dtype)


def layer_of(networks: Networks, layer: str) -> nn.Linear | nn.Conv2d:
    """The module that a layer's name means."""
    network, _, path = layer.partition(".")
    return networks[network].get_submodule(path)


# -------------------------------------------------------------------------------------------------------------- reading


def load_lora(path: str | os.PathLike, networks: Networks) -> Lora:
    """Read a LoRA in kohya's, peft's or the old diffusers layout for these networks.

    Tensors keep the file's dtype. A UserWarning counts and names what belongs to no layer of the networks.
    CheckpointError where the file holds none, another kind of adapter, or one for models of another width.
    """
    file = open_lora(path)
    names, (config, _) = names_from_official(networks), peft_config(file)
    lora: dict[str, LowRank] = {}
    used: set[str] = set()
    for pair in pairs_in(file):
        if (layer := names.get(flat_name(pair.module))) is None:
            continue
        if layer in lora:
            _refuse(path, f"it changes the layer {layer} twice, the second time as {pair.module}")
        _check_shapes(file, pair, layer, networks)
        lora[layer] = _read(file, pair, config)
        used |= {pair.down, pair.up, pair.mid, pair.alpha}
    unmatched = [name for name in file if name not in used]
    if not lora:
        _refuse(path, f"none of its {len(file)} tensors belongs to a layer of this model, first: {unmatched[0]}")
    if unmatched:
        warnings.warn(
            f"{path}: {len(unmatched)} of its {len(file)} tensors belong to no layer of this model and are left out, "
            f"first: {unmatched[0]}",
            stacklevel=2,
        )
    return lora


def open_lora(path: str | os.PathLike) -> TensorFile:
    """The file, if it is a LoRA that some model of Stable Diffusion 1.x or 2.x may take; its values are not read."""
    file = open_tensors(path)
    if kinds := lycoris_kinds(file):
        _refuse(path, f"it is a {'/'.join(kinds)} adapter: only plain LoRAs are read")
    if not (pairs := pairs_in(file)):
        _refuse(path, f"it holds no LoRA (no lora_down, lora_A …): `minisd inspect {path}` says what it is")
    if family := lora_base(file):
        _refuse(path, f"it is for {family}: minisd runs Stable Diffusion 1.x and 2.x only")
    for pair in pairs:
        if pair.up not in file:
            _refuse(path, f"the layer {pair.module} lacks its second matrix, {pair.up}: is the file whole?")
    return file


def _check_shapes(file: TensorFile, pair: Pair, layer: str, networks: Networks) -> None:
    down, up, weight = file.shape(pair.down), file.shape(pair.up), tuple(layer_of(networks, layer).weight.shape)
    kernel = file.shape(pair.mid)[2:] if pair.mid in file else down[2:]
    ranked = len(down) in (2, 4) and len(up) in (2, 4) and up[1] == down[0] > 0 and set(up[2:]) <= {1}
    if pair.mid in file:
        ranked &= len(file.shape(pair.mid)) == 4 and file.shape(pair.mid)[:2] == (down[0],) * 2 and set(down[2:]) <= {1}
    if not ranked:
        _refuse(file.path, f"the matrices of {pair.module} do not belong together: {down} and {up} have no common rank")
    changed = (up[0], down[1], *kernel)
    # a 1×1 convolution and a linear layer are the same matrix: SD2's projections are written as either
    if changed[:2] == weight[:2] and (set(changed[2:]) | set(weight[2:]) <= {1} or changed == weight):
        return
    own = networks["unet"].config.context_dim
    if (width := text_width(file, pairs_in(file))) not in (None, own):
        _refuse(file.path, other_family(width, own))
    _refuse(file.path, f"it changes {pair.module} as a weight of {changed}, this model's is {weight}: another model's?")


def _read(file: TensorFile, pair: Pair, config: Mapping) -> LowRank:
    down, up = (_finite(file, name) for name in (pair.down, pair.up))
    if pair.mid in file:  # LoCon: two convolutions in a row are one
        mid = _finite(file, pair.mid)
        down = torch.einsum("r q ..., q i -> r i ...", mid.to(wide(mid.dtype)), down.to(wide(mid.dtype)).flatten(1))
    rank = down.shape[0]
    if pair.alpha in file:
        stored = _finite(file, pair.alpha)
        if stored.numel() != 1:
            _refuse(file.path, f"{pair.alpha} holds {stored.numel()} numbers, not one")
        alpha = float(stored)
    elif (alpha := peft_alpha(config, pair.module, rank)) is None:
        alpha = float(rank)
    return LowRank(down, up, alpha)


def _finite(file: TensorFile, name: str) -> Tensor:
    if not file.dtype(name).is_floating_point and not name.endswith(".alpha"):
        _refuse(file.path, f"{name} holds {file.dtype(name)}: quantised LoRAs are not read")
    tensor = file.read(name)
    if not tensor.to(wide(tensor.dtype)).isfinite().all():
        _refuse(file.path, f"{name} holds values that are not finite (NaN, Inf): its training went wrong")
    return tensor


def _refuse(path: str | os.PathLike, why: str):
    raise CheckpointError(f"{path}: {why}")


# -------------------------------------------------------------------------------------------------------------- writing


def save_lora(
    path: str | os.PathLike,
    lora: Lora,
    networks: Networks,
    *,
    layout: Literal["kohya", "peft"] = "kohya",
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a LoRA as safetensors, all or nothing, for these networks.

    "kohya" is read by A1111, ComfyUI and diffusers, alpha in it. "peft" is what diffusers itself writes; readers of it
    differ in where they look for alpha, so there it is the rank, and `up` carries the scale (exact where that is a
    power of two). metadata: text for the file's header.
    """
    if layout not in ("kohya", "peft"):
        raise ValueError(f"layout={layout!r}; allowed: kohya, peft")
    if os.path.splitext(os.fspath(path))[1] != ".safetensors":
        raise ValueError(f"{path}: a LoRA is saved as safetensors: name it {os.path.splitext(path)[0]}.safetensors")
    names, tensors = names_to_official(networks), {}
    for layer, low_rank in lora.items():
        if layer not in names:
            raise ValueError(f"{layer!r} is no layer that a LoRA can change; they are {next(iter(names))}, …")
        network, module = names[layer]
        if layout == "kohya":
            module = {"unet": "lora_unet_", "text_encoder": "lora_te_"}[network] + module.replace(".", "_")
            alpha = torch.tensor(low_rank.alpha, dtype=wide(low_rank.down.dtype))
            own = {"lora_down.weight": low_rank.down, "lora_up.weight": low_rank.up, "alpha": alpha}
        else:
            module = f"{network}.{module}"
            up = low_rank.up if low_rank.scale == 1 else low_rank.up * low_rank.scale
            own = {"lora_A.weight": low_rank.down, "lora_B.weight": up}
        tensors |= {f"{module}.{leaf}": tensor for leaf, tensor in own.items()}
    save_safetensors(path, tensors, {"format": "pt", **(metadata or {})})
