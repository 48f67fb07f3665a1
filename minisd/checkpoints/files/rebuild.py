"""What the names in a torch pickle may mean: the allow-list, and the lazy objects it builds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from minisd.checkpoints.files.entries import STORAGE_DTYPES, TORCH_DTYPES, Malformed, span

MAX_INDEX = 1 << 32  # integer keys: larger ones can be chosen to collide, which makes a dict quadratic


@dataclass(frozen=True, slots=True)
class Name:
    """A global as the file names it. Never looked up."""

    module: str
    attribute: str

    def __str__(self) -> str:
        return f"{self.module}.{self.attribute}"


@dataclass(frozen=True, slots=True)
class Dropped:
    """Stands for an object that is not built."""

    name: str


@dataclass(frozen=True, slots=True)
class Storage:
    """The bytes under one or more tensors; the container knows where `key` lies in the file."""

    key: str
    dtype: torch.dtype
    nbytes: int


@dataclass(frozen=True, slots=True)
class LazyTensor:
    """A tensor on a storage: offset in bytes, stride in elements, nbytes spanned."""

    storage: Storage
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    nbytes: int


class ParameterDict(dict):
    """torch.nn.ParameterDict, which textual-inversion files hold: its BUILD state has the parameters."""


def is_key(value: Any) -> bool:
    return isinstance(value, str | bytes | None) or (isinstance(value, int) and -MAX_INDEX < value < MAX_INDEX)


def storage_dtype(kind: Name) -> torch.dtype | None:
    if kind.module not in ("torch", "torch.cuda", "torch.storage"):
        return None
    if kind.attribute in ("UntypedStorage", "_UntypedStorage"):
        return torch.uint8  # bytes; the tensor brings its own dtype
    return STORAGE_DTYPES.get(kind.attribute)


def _tensor(storage, offset, size, stride, *rest, dtype: torch.dtype | None = None, metadata=None):
    """torch._utils._rebuild_tensor and _rebuild_tensor_v2: (…, requires_grad, backward_hooks, metadata=None)."""
    if isinstance(storage, Dropped):
        return storage
    metadata = rest[2] if len(rest) > 2 else metadata
    if metadata:
        raise Malformed("a tensor is a conjugate or negative view: save it with .resolve_conj().resolve_neg()")
    dtype = dtype or storage.dtype
    size, stride = tuple(size), tuple(stride)
    numbers = (offset, *size, *stride)
    if len(size) != len(stride) or not all(type(n) is int and 0 <= n < 1 << 62 for n in numbers):
        raise Malformed("a tensor's offset, shape or strides are not what torch writes: its pickle is damaged")
    begin, nbytes = offset * dtype.itemsize, span(size, stride) * dtype.itemsize
    if begin + nbytes > storage.nbytes:
        raise Malformed(f"a tensor of shape {size} ends outside its storage of {storage.nbytes:,} bytes")
    return LazyTensor(storage, dtype, begin, size, stride, nbytes)


def _tensor_v3(storage, offset, size, stride, requires_grad, hooks, dtype: Name, metadata=None):
    if dtype.module != "torch" or dtype.attribute not in TORCH_DTYPES:
        return Dropped(str(dtype))
    return _tensor(storage, offset, size, stride, dtype=TORCH_DTYPES[dtype.attribute], metadata=metadata)


def _parameter(data, requires_grad=True, hooks=None, state=None):
    return data


def _from_type(function: Name, kind, args: tuple, state):
    """A tensor that carries attributes: torch.Tensor's own __reduce_ex__."""
    builder = BUILDERS.get(str(function))
    return builder(*args) if builder in (_tensor, _tensor_v3, _parameter) else Dropped(str(kind))


def _dict(items=()):
    return {key: value for key, value in (items.items() if isinstance(items, dict) else items) if is_key(key)}


def _encode(text: str, encoding: str = "latin1") -> bytes | Dropped:
    return text.encode("latin1") if encoding == "latin1" else Dropped(f"bytes in {encoding}")


BUILDERS = {
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_v3,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch._tensor._rebuild_from_type_v2": _from_type,
    "torch.nn.modules.container.ParameterDict": lambda *args: ParameterDict(),
    "torch.Size": lambda sizes=(): tuple(sizes),
    "collections.OrderedDict": _dict,
    "collections.defaultdict": lambda *args: {},
    "builtins.set": lambda items=(): list(items),
    "__builtin__.set": lambda items=(): list(items),
    "_codecs.encode": _encode,
}
