"""The safetensors format: its header read and checked, and files written that can be told from damaged ones.

What minisd saves carries two checksums in its metadata. `minisd_sha256` covers every tensor's name, dtype, shape and
bytes; `minisd_header_sha256` covers the other metadata and the names, dtypes and shapes, and is checked on every open.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import BinaryIO

import safetensors
import torch
from torch import Tensor

from minisd.checkpoints.files.containers import Content
from minisd.checkpoints.files.entries import (
    SAFETENSORS_DTYPES,
    SAFETENSORS_NAMES,
    Entry,
    Malformed,
    contiguous_stride,
    span,
)
from minisd.checkpoints.files.mapped import CHUNK, MappedFile
from minisd.files import write_whole

MAX_HEADER = 100_000_000  # the format's own limit, bytes
DIGEST, HEADER_DIGEST = "minisd_sha256", "minisd_header_sha256"
Line = tuple[str, str, list[int]]  # name, dtype, shape


def read_safetensors(file: MappedFile, path: str) -> Content:
    """Header of a safetensors file: length (8 bytes, little-endian), JSON, then the tensors without gaps."""
    length = int.from_bytes(file.bytes(0, 8), "little")
    if length > MAX_HEADER or 8 + length > file.size:
        raise Malformed(f"its header of {length:,} bytes does not fit into the file's {file.size:,}: it is cut short")
    try:
        header = json.loads(file.bytes(8, length), object_pairs_hook=_without_duplicates)
        size = 8 + length + max((t["data_offsets"][1] for n, t in header.items() if n != "__metadata__"), default=0)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError) as error:
        raise Malformed(f"its safetensors header is damaged ({str(error)[:200]}): fetch it again") from error
    if size > file.size:
        raise Malformed(f"it is cut short ({file.size:,} of {size:,} bytes), an interrupted download: fetch it again")
    try:
        with safetensors.safe_open(path, "np") as handle:  # checks types, sizes, overlaps and gaps
            names, metadata = set(handle.keys()), handle.metadata() or {}
    except (safetensors.SafetensorError, OSError) as error:
        raise Malformed(f"safetensors refuses it ({error}): fetch it again") from error
    header.pop("__metadata__", None)
    if names != set(header):
        raise Malformed("its header is read differently by safetensors: fetch it again")

    tree = {}
    for name, tensor in header.items():
        if tensor["dtype"] not in SAFETENSORS_DTYPES:
            known = ", ".join(SAFETENSORS_DTYPES)
            raise Malformed(f"{name} is of dtype {tensor['dtype']}, which this torch does not have (known: {known})")
        (begin, end), shape = tensor["data_offsets"], tuple(tensor["shape"])
        stride = contiguous_stride(shape)
        span(shape, stride)  # refuses shapes that torch cannot count
        dtype = SAFETENSORS_DTYPES[tensor["dtype"]]
        tree[name] = Entry(dtype, shape, stride, 8 + length + begin, end - begin)
    _check_header(tree, metadata)
    return Content("safetensors", tree, metadata=metadata)


def _without_duplicates(pairs: list[tuple]) -> dict:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name occurs twice")
    return result


def _check_header(entries: Mapping[str, Entry], metadata: Mapping[str, str]) -> None:
    if DIGEST not in metadata and HEADER_DIGEST not in metadata:
        return
    lines = _lines((name, entry.dtype, entry.shape) for name, entry in entries.items())
    if DIGEST not in metadata or metadata.get(HEADER_DIGEST) != _header_digest(metadata, lines):
        raise Malformed(
            "its header is not the one minisd wrote: it is damaged (fetch it again), or another program changed it "
            f"(then let that program leave out the metadata {DIGEST} and {HEADER_DIGEST})"
        )


def verify_safetensors(file: MappedFile, entries: Mapping[str, Entry], metadata: Mapping[str, str]) -> bool:
    """Recompute `minisd_sha256` from the file; False if it has none, Malformed if it differs."""
    if DIGEST not in metadata:
        return False
    digest = hashlib.sha256()
    for line in _lines((name, entry.dtype, entry.shape) for name, entry in entries.items()):
        digest.update(_canonical(line))
        for chunk in file.chunks(entries[line[0]].offset, entries[line[0]].nbytes):
            digest.update(chunk)
    if digest.hexdigest() != metadata[DIGEST]:
        raise Malformed("its tensors do not match their checksum: the file is damaged, fetch or make it again")
    return True


def save_safetensors(
    path: str | os.PathLike, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file with checksums, all of it or nothing: beside the target, then renamed over it.

    The old file survives every failure, and may be the very one that the tensors are mapped from. Equal content gives
    equal bytes. Tensors of any layout and device are written one after the other, as contiguous copies at need.
    ValueError for what the format cannot hold; OSError as the system reports it.
    """
    metadata = {k: v for k, v in (metadata or {}).items() if k not in (DIGEST, HEADER_DIGEST)}
    if not all(isinstance(text, str) for item in metadata.items() for text in item):
        raise ValueError(f"{path}: metadata must map str to str; turn other values into JSON text")
    for name, tensor in tensors.items():
        if not isinstance(name, str) or name == "__metadata__" or not isinstance(tensor, Tensor):
            raise ValueError(f"{path}: cannot save {name!r}: names are str (not __metadata__), values tensors")
        if tensor.dtype not in SAFETENSORS_NAMES or tensor.layout != torch.strided or tensor.is_meta:
            known = ", ".join(str(dtype) for dtype in SAFETENSORS_NAMES)
            given = f"{tensor.dtype}, {tensor.layout}, on {tensor.device}"
            raise ValueError(f"{path}: {name} is {given}; safetensors holds dense tensors with values: {known}")
    lines = _lines((name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items())

    write_whole(path, lambda out: _write(out, lines, tensors, metadata), make_folder=False)


def _write(out: BinaryIO, lines: list[Line], tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """One pass: a header with a blank digest, the tensors while they are hashed, the header again."""
    header_size = out.write(_header(lines, tensors, metadata, "0" * 64))
    digest = hashlib.sha256()
    for line in lines:
        digest.update(_canonical(line))
        for chunk in _bytes_of(tensors[line[0]]):
            digest.update(chunk)
            out.write(chunk)
    header = _header(lines, tensors, metadata, digest.hexdigest())
    assert len(header) == header_size
    out.seek(0)
    out.write(header)


def _header(lines: list[Line], tensors: Mapping[str, Tensor], metadata: dict[str, str], digest: str) -> bytes:
    metadata = metadata | {DIGEST: digest}
    metadata[HEADER_DIGEST] = _header_digest(metadata, lines)
    header, end = {"__metadata__": dict(sorted(metadata.items()))}, 0
    for name, dtype, shape in lines:
        begin, end = end, end + tensors[name].numel() * tensors[name].element_size()
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # the tensors begin on 8 bytes, and widest first keeps all of them aligned
    if len(text) > MAX_HEADER:
        raise ValueError(f"the header has {len(text):,} bytes, safetensors allows {MAX_HEADER:,}: shorten the metadata")
    return len(text).to_bytes(8, "little") + text


def _bytes_of(tensor: Tensor) -> Iterator[memoryview]:
    flat = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous().view(-1).view(torch.uint8)
    for start in range(0, flat.numel(), CHUNK):
        yield memoryview(flat[start : start + CHUNK].numpy())


def _lines(tensors: Iterable[tuple[str, torch.dtype, tuple[int, ...]]]) -> list[Line]:
    """The order of the file: widest dtype first, then by name."""
    order = sorted(tensors, key=lambda tensor: (-tensor[1].itemsize, tensor[0]))
    return [(name, SAFETENSORS_NAMES[dtype], list(shape)) for name, dtype, shape in order]


def _header_digest(metadata: Mapping[str, str], lines: list[Line]) -> str:
    covered = {key: value for key, value in metadata.items() if key != HEADER_DIGEST}
    return hashlib.sha256(_canonical(covered) + b"".join(map(_canonical, lines))).hexdigest()


def _canonical(value) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode() + b"\n"
