"""A network from a part of a checkpoint: every name and shape is checked, then the tensors are assigned, not copied."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from minisd.checkpoints.detect import Part
from minisd.checkpoints.files.entries import CheckpointError
from minisd.checkpoints.keymaps import KeyMap, from_official, keymap
from minisd.checkpoints.networks import NETWORKS
from minisd.checkpoints.networks.format import Renamed

Cast = Callable[[torch.dtype], torch.dtype]
READERS = 4  # threads at most that read and convert tensors


def keep_dtype(dtype: torch.dtype) -> torch.dtype:
    return dtype


def build(
    name: str,
    part: Part,
    *,
    cast: Cast = keep_dtype,
    device: str | torch.device = "cpu",
    rest: Renamed | None = None,
    where: str | os.PathLike = "",
) -> nn.Module:
    """The network of a part: its tensors stay mapped where the dtype stays, and are converted one by one where not.

    cast: the dtype to load for the dtype in the file. rest: what the part lacks, under the names of the original's
    files. where: the file's name, for the errors.
    """
    if part.doubt:
        refuse_doubt(where, part.doubt)
    network = on_meta(name, part.config, where)
    shapes = {ours: tuple(tensor.shape) for ours, tensor in network.state_dict().items()}
    names = keymap(network, part.dialect)
    held = {ours: source for ours, source in names.items() if source.key in part.tensors}
    state = _read_checked(name, held, part.tensors, shapes, where, cast, device)
    if rest is not None:
        more = keymap(network, NETWORKS[name].single_file_dialect(part.config)).items()
        more = {ours: source for ours, source in more if ours not in held and source.key in rest}
        state |= _read_checked(name, more, rest, shapes, where, cast, device)
    if missing := [source.key for ours, source in names.items() if ours not in state]:
        refuse(where, f"{len(missing)} tensors of its {name} are missing, first: {missing[0]}: is it whole?")
    used = {source.key for source in names.values()}
    if foreign := [key for key in part.tensors if key not in used]:
        refuse(where, f"{len(foreign)} tensors of its {name} belong to no layer of {part.config}, first: {foreign[0]}")
    assign(network, state)
    return network.eval()


def assign(network: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Make these tensors, of checked names and shapes, the parameters: load_state_dict(assign=True), in a quarter of
    the time."""
    modules = dict(network.named_modules())
    for name, tensor in state.items():
        module, _, leaf = name.rpartition(".")
        setattr(modules[module], leaf, nn.Parameter(tensor))


def on_meta(name: str, config, where: str | os.PathLike = "") -> nn.Module:
    """The network without memory for its weights, nor time spent on drawing them."""
    try:
        with _Undrawn():
            return NETWORKS[name].module(config)
    except (ValueError, TypeError, ArithmeticError, RuntimeError) as error:  # sizes that torch refuses
        raise CheckpointError(f"{where}: no {name} can be built from {config}: {str(error)[:200]}") from error


class _Undrawn(TorchFunctionMode):
    """Makes tensors on the meta device, and leaves out torch.nn.init, in this thread.

    On meta its draws compute nothing, yet import torch's compiler (2 s). One mode for both: every call passes through.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.empty:
            return func(*args, **{**kwargs, "device": "meta"})
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


def _read_checked(
    name: str, names: KeyMap, tensors: Renamed, shapes: dict, where, cast: Cast, device
) -> dict[str, Tensor]:
    for ours, source in names.items():
        shape = tensors.shape(source.key)
        rank = len(shape)
        packed = source.third is not None and (rank == 0 or shape[0] % 3)
        if packed or ((source.transposed or source.linear) and rank != 2):
            refuse(where, f"{source.key} of its {name} has the impossible shape {shape}")
        if not tensors.dtype(source.key).is_floating_point:
            dtype = tensors.dtype(source.key)
            refuse(where, f"{source.key} of its {name} holds {dtype}: quantised files are not supported")
        if (shape := source.our_shape(shape)) != shapes[ours]:
            refuse(where, f"{source.key} of its {name} has shape {shape}, {shapes[ours]} is expected")

    def read(key: str) -> Tensor:
        dtype = cast(tensors.dtype(key))
        tensor = tensors[key] if dtype == tensors.dtype(key) else tensors.read(key, dtype)
        return tensor.to(device)

    keys = list(dict.fromkeys(source.key for source in names.values()))
    if torch.device(device).type == "cpu" and all(cast(tensors.dtype(key)) == tensors.dtype(key) for key in keys):
        return from_official(read, names)  # nothing is read
    # Most of the time goes into the system's handing out of memory: quickest from as many threads as there are cores,
    # each converting by itself.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(min(READERS, threads)) as pool:
            return from_official(dict(zip(keys, pool.map(read, keys), strict=True)).__getitem__, names)
    finally:
        torch.set_num_threads(threads)


def refuse(where: str | os.PathLike, why: str):
    raise CheckpointError(f"{where}: {why}")


def refuse_doubt(where: str | os.PathLike, doubt: str):
    refuse(where, f"{doubt}: give config=, a diffusers folder (its config.json says it) or a file saved by minisd")
