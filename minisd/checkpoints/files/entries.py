"""Where a tensor lies in a file: dtypes and their names, `Entry`, and the error every reader raises."""

from __future__ import annotations

import os
from dataclasses import dataclass
from math import prod
from typing import NoReturn

import torch

# safetensors name, torch name, name of the storage class in torch pickles
_DTYPES = (
    ("F64", "float64", "DoubleStorage"),
    ("F32", "float32", "FloatStorage"),
    ("F16", "float16", "HalfStorage"),
    ("BF16", "bfloat16", "BFloat16Storage"),
    ("F8_E4M3", "float8_e4m3fn", None),
    ("F8_E5M2", "float8_e5m2", None),
    ("F8_E4M3FNUZ", "float8_e4m3fnuz", None),
    ("F8_E5M2FNUZ", "float8_e5m2fnuz", None),
    ("F8_E8M0", "float8_e8m0fnu", None),
    ("I64", "int64", "LongStorage"),
    ("I32", "int32", "IntStorage"),
    ("I16", "int16", "ShortStorage"),
    ("I8", "int8", "CharStorage"),
    ("U64", "uint64", None),
    ("U32", "uint32", None),
    ("U16", "uint16", None),
    ("U8", "uint8", "ByteStorage"),
    ("BOOL", "bool", "BoolStorage"),
    ("C64", "complex64", "ComplexFloatStorage"),
    (None, "complex128", "ComplexDoubleStorage"),
)
_KNOWN = [(safe, getattr(torch, name), storage) for safe, name, storage in _DTYPES if hasattr(torch, name)]
SAFETENSORS_DTYPES = {safe: dtype for safe, dtype, _ in _KNOWN if safe}
SAFETENSORS_NAMES = {dtype: safe for safe, dtype in SAFETENSORS_DTYPES.items()}
STORAGE_DTYPES = {storage: dtype for _, dtype, storage in _KNOWN if storage}
TORCH_DTYPES = {str(dtype).removeprefix("torch."): dtype for _, dtype, _ in _KNOWN}


class CheckpointError(ValueError):
    """A file cannot be read as a checkpoint. The message names the file, what is in it and what to do."""


def refuse(path: str | os.PathLike, why: str) -> NoReturn:
    raise CheckpointError(f"{path}: {why}")


class Malformed(ValueError):
    """What a parser found wrong with the bytes; `open_tensors` adds the file's name and makes it a CheckpointError."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor that has not been read: stride counts elements; offset and nbytes are the bytes it spans in the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    nbytes: int

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def is_contiguous(self) -> bool:
        return self.nbytes == self.numel * self.dtype.itemsize and self.stride == contiguous_stride(self.shape)


def contiguous_stride(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Row-major strides in elements, the ones torch gives a new tensor of this shape."""
    stride = [1] * len(shape)
    for i in range(len(shape) - 1, 0, -1):
        stride[i - 1] = stride[i] * max(shape[i], 1)
    return tuple(stride)


def span(shape: tuple[int, ...], stride: tuple[int, ...]) -> int:
    """Elements between a strided tensor's first and last, both counted. Malformed for what torch cannot hold
    and for elements that overlap, which a few bytes of file could blow up to any size."""
    if len(shape) > 64 or prod(size for size in shape if size) >= 1 << 62:
        raise Malformed("a tensor has more dimensions or elements than torch can count")
    if 0 in shape:
        return 0
    reach = 1
    for step, size in sorted((step, size) for size, step in zip(shape, stride, strict=True) if size > 1):
        if step < reach:
            raise Malformed(f"a tensor of shape {shape} and strides {stride} overlaps itself (an expanded view)")
        reach += step * (size - 1)
    return reach
