"""Who is there to be measured beside minisd, and what the peers' programs have in common."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from minisd.bench.options import Options
from minisd.bench.pairs import Program

if TYPE_CHECKING:
    from torch import Tensor, nn

JUDGE = "diffusers"  # whose float32 result counts as right
# A peer's name → the packages it wants, and how to get them. A contender of no line here is minisd's own.
NEEDS = {
    "diffusers": (("diffusers", "transformers"), "pip install 'minisd[parity]'"),
    "diffusers-compiled": (("diffusers", "transformers"), "pip install 'minisd[parity]'"),
    "openvino": (("openvino", "diffusers"), "pip install openvino 'minisd[parity]'"),
}
ASKED_FOR = ("diffusers-compiled",)  # takes minutes: only where it is named


def chosen(contenders: Mapping[str, Program], wanted: tuple[str, ...] | None) -> dict[str, Program]:
    """minisd, then the peers that were asked for; all that are installed when wanted is None, and "none" is none.

    ValueError for an unknown peer, and for one whose packages are not installed.
    """
    if wanted is None:
        wanted = tuple(name for name in contenders if name != "minisd" and name not in ASKED_FOR and installed(name))
    peers = [name for name in wanted if name not in ("none", "minisd")]
    for name in peers:
        if name not in contenders:
            known = ", ".join(["none", *(name for name in contenders if name != "minisd")])
            raise ValueError(f"unknown peer {name!r}; known here: {known}")
        if not installed(name):
            raise ValueError(f"the peer {name} is not installed: {NEEDS[name][1]}")
    return {name: contenders[name] for name in ("minisd", *peers)}


def shared_with(contenders: Mapping[str, object], options: Options) -> Options:
    """The options of all subjects, with those of the peers that this one knows; all of its own where it knows none."""
    known = tuple(name for name in options.peers or () if name == "none" or name in contenders)
    return replace(options, peers=known or None)


def installed(name: str) -> bool:
    packages, _ = NEEDS.get(name, ((), ""))
    return all(importlib.util.find_spec(package) for package in packages)


def judge(contenders: Mapping[str, Program]) -> Program | None:
    """The program whose float32 result counts as right; None where it is not installed."""
    return contenders[JUDGE] if installed(JUDGE) else None


def compiled_by_openvino(module: nn.Module, inputs: tuple[Tensor, ...], dtype: str) -> Callable[..., Tensor]:
    """A PyTorch module as OpenVINO runs it on the CPU, for inputs of these shapes: *inputs → its one output."""
    import openvino
    import torch

    shapes = [openvino.PartialShape(list(x.shape)) for x in inputs]
    model = openvino.convert_model(module, example_input=inputs, input=shapes)
    precision = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}[dtype]
    options = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    network = openvino.Core().compile_model(model, "CPU", options)
    return lambda *inputs: torch.from_numpy(network([x.numpy() for x in inputs])[0])
