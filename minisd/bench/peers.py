"""The peers: which libraries are compared with minisd, and what their contenders share."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from minisd.bench.options import BenchOptions
from minisd.bench.pairs import Contender

if TYPE_CHECKING:
    from torch import Tensor, nn

REFERENCE = "diffusers"  # whose float32 result is taken as exact
# A peer's name → the packages it needs, and how to install them. Contenders without a row are minisd's own.
REQUIREMENTS = {
    "diffusers": (("diffusers", "transformers"), "pip install 'minisd[parity]'"),
    "diffusers-compiled": (("diffusers", "transformers"), "pip install 'minisd[parity]'"),
    "openvino": (("openvino", "diffusers"), "pip install openvino 'minisd[parity]'"),
}
ONLY_BY_NAME = ("diffusers-compiled",)  # compiles for minutes


def select(contenders: Mapping[str, Contender], names: tuple[str, ...] | None) -> dict[str, Contender]:
    """minisd, then the named peers; names: None for all that are installed, ("none",) for none.

    ValueError for an unknown peer, and for one whose packages are not installed.
    """
    if names is None:
        names = tuple(name for name in contenders if name != "minisd" and name not in ONLY_BY_NAME and installed(name))
    peers = [name for name in names if name not in ("none", "minisd")]
    for name in peers:
        if name not in contenders:
            known = ", ".join(["none", *(name for name in contenders if name != "minisd")])
            raise ValueError(f"unknown peer {name!r}; known here: {known}")
        if not installed(name):
            raise ValueError(f"the peer {name} is not installed: {REQUIREMENTS[name][1]}")
    return {name: contenders[name] for name in ("minisd", *peers)}


def with_known_peers(contenders: Mapping[str, object], options: BenchOptions) -> BenchOptions:
    """The options, with those of their peers that are among these contenders; where none is, with all installed."""
    peers = tuple(name for name in options.peers or () if name == "none" or name in contenders)
    return replace(options, peers=peers or None)


def installed(name: str) -> bool:
    packages, _ = REQUIREMENTS.get(name, ((), ""))
    return all(importlib.util.find_spec(package) for package in packages)


def reference_of(contenders: Mapping[str, Contender]) -> Contender | None:
    """The contender whose float32 result is taken as exact; None where it is not installed."""
    return contenders[REFERENCE] if installed(REFERENCE) else None


def compiled_by_openvino(module: nn.Module, inputs: tuple[Tensor, ...], dtype: str) -> Callable[..., Tensor]:
    """A PyTorch module compiled by OpenVINO for the CPU and inputs of these shapes: *inputs → its one output."""
    import openvino
    import torch

    shapes = [openvino.PartialShape(list(x.shape)) for x in inputs]
    model = openvino.convert_model(module, example_input=inputs, input=shapes)
    precision = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}[dtype]
    options = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    network = openvino.Core().compile_model(model, "CPU", options)
    return lambda *inputs: torch.from_numpy(network([x.numpy() for x in inputs])[0])
