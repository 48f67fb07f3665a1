"""Checkpoint files: opened without reading their tensors, whatever their format; saved whole or not at all."""

from __future__ import annotations

import difflib
import os
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from minisd.checkpoints.files.containers import Content, read_legacy, read_zip
from minisd.checkpoints.files.entries import CheckpointError, Entry, Malformed
from minisd.checkpoints.files.identify import what_is, why_unreadable
from minisd.checkpoints.files.mapped import MappedFile
from minisd.checkpoints.files.safe import read_safetensors, save_safetensors, verify_safetensors

__all__ = ["CheckpointError", "Entry", "TensorFile", "folded", "open_tensors", "save_safetensors"]

MAX_NAME = 2000  # characters; long keys on every level would multiply
MAX_FOLDED = 1 << 31  # bytes that a folded table may have: a few bytes of a file must not ask for any amount
ROWS = ".minisd_rows"  # NAME + ROWS says which row of NAME stands at each place of a folded table


def open_tensors(path: str | os.PathLike) -> TensorFile:
    """Open a safetensors file or a torch pickle (zip or legacy), told apart by content, never by extension.

    Only the index is read; no code in a pickle is run. CheckpointError for everything that is no such file.
    """
    path = os.fspath(path)
    if reason := why_unreadable(path):
        raise CheckpointError(f"{path} {reason}")
    if os.path.getsize(path) == 0:
        raise CheckpointError(f"{path}: it is empty (0 bytes), as a failed download is: fetch it again")
    try:
        file = MappedFile(path)
        return TensorFile(path, file, _content(file, path))
    except Malformed as error:
        raise CheckpointError(f"{path}: {error}") from error
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be opened and mapped ({error})") from error


def _content(file: MappedFile, path: str) -> Content:
    head = file.bytes(0, 512)
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 1 << 40:  # first: the length may spell PK or a pickle
        return read_safetensors(file, path)
    if head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        return read_zip(file)
    if head[:1] == b"\x80" and head[1:2] <= b"\x05":
        return read_legacy(file)
    raise Malformed(what_is(head, file.size))


class TensorFile(Mapping[str, Tensor]):
    """A read-only mapping name -> tensor over one file. `file[name]` is a view of the file's private map: no copy, read
    when it is used, and editing it in place never touches the file. It outlives this object.

    Names: those of the mapping under "state_dict" if the file has one, else of everything in it; tensors in nested
    containers have the path as their name, joined by dots (a bare tensor: ""). `tree` is the whole content with
    `Entry`s for tensors, `extra` its plain values at the top (global_step, epoch, ...), `metadata` the text that
    safetensors files carry, `dropped` the names of pickled objects that were not built. A table that `folded` made
    small is seen at its full size.
    """

    def __init__(self, path: str, file: MappedFile, content: Content):
        self.path, self.format, self.tree = path, content.format, content.tree
        self.metadata, self.dropped = dict(content.metadata), content.dropped
        top = content.tree if isinstance(content.tree, dict) else {}
        plain = str | int | float | bytes
        self.extra = {name: value for name, value in top.items() if isinstance(value, plain) or value is None}
        state = top.get("state_dict")
        self._stored: dict[str, Entry] = {}
        for name, entry in flatten(state if isinstance(state, dict) else content.tree, ""):
            if self._stored.setdefault(name, entry) is not entry:
                raise Malformed(f"two tensors have the name {name!r}")
        tables = {name: entry for name, entry in self._stored.items() if not self._is_rows(name)}
        self.entries = {name: self._unfolded(name, entry) for name, entry in tables.items()}
        if self.dropped and not self.entries:
            objects = ", ".join(self.dropped[:3])
            raise Malformed(f"it holds pickled objects ({objects}) and no tensors: save a state_dict() instead")
        self._file, self._checksums = file, content.checksums

    def __getitem__(self, name: str) -> Tensor:
        return self._gather(name) if name + ROWS in self._stored else self._file.view(self.entry(name))

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def get(self, name: str, default: Any = None) -> Any:
        return self[name] if name in self.entries else default

    def __contains__(self, name: object) -> bool:
        return name in self.entries

    def __repr__(self) -> str:
        return f"TensorFile({self.path!r}, {self.format}, {len(self)} tensors)"

    def entry(self, name: str) -> Entry:
        if name not in self.entries:
            near = difflib.get_close_matches(name, self.entries, n=1)
            raise KeyError(f"{self.path} has no tensor {name!r}" + (f"; near: {near[0]!r}" if near else ""))
        return self.entries[name]

    def shape(self, name: str) -> tuple[int, ...]:
        return self.entry(name).shape

    def dtype(self, name: str) -> torch.dtype:
        return self.entry(name).dtype

    @property
    def stored_rows(self) -> dict[str, int]:
        """How many rows the file holds of each folded table (see the function `folded`)."""
        return {name: self._stored[name].shape[0] for name in self.entries if name + ROWS in self._stored}

    def read(self, name: str | Entry, dtype: torch.dtype | None = None) -> Tensor:
        """A contiguous tensor of its own, converted on the way; of the file no more than a few chunks are in memory."""
        if isinstance(name, str) and name + ROWS in self._stored:
            return self._gather(name).to(dtype)
        return self._file.read(name if isinstance(name, Entry) else self.entry(name), dtype)

    def _is_rows(self, name: str) -> bool:
        return name.endswith(ROWS) and name.removesuffix(ROWS) in self._stored

    def _unfolded(self, name: str, entry: Entry) -> Entry:
        """The entry with the shape that the whole table has."""
        rows = self._stored.get(name + ROWS)
        if rows is None:
            return entry
        if rows.dtype != torch.int32 or len(rows.shape) != 1 or len(entry.shape) != 2:
            raise Malformed(f"{name} and {name + ROWS} are no folded table: shapes {entry.shape} and {rows.shape}")
        if (size := rows.numel * entry.shape[1] * entry.dtype.itemsize) > MAX_FOLDED:
            raise Malformed(f"{name} would unfold to {size:,} bytes, allowed are {MAX_FOLDED:,}")
        return replace(entry, shape=(*rows.shape, *entry.shape[1:]))

    def _gather(self, name: str) -> Tensor:
        table, rows = self._file.read(self._stored[name]), self._file.read(self._stored[name + ROWS])
        if len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < len(table):
            raise CheckpointError(f"{self.path}: {name + ROWS} points beyond the {len(table)} rows of {name}: damaged")
        return table[rows]

    def verify(self) -> bool:
        """Read the whole file against its checksums; CheckpointError where they differ, False if it has none."""
        for record, (offset, nbytes, crc) in self._checksums.items():
            actual = 0
            for chunk in self._file.chunks(offset, nbytes):
                actual = zlib.crc32(chunk, actual)
            if actual != crc:
                raise CheckpointError(f"{self.path}: {record} does not match its checksum: damaged, fetch it again")
        if self._checksums:
            return True
        try:
            return verify_safetensors(self._file, self._stored, self.metadata)
        except Malformed as error:
            raise CheckpointError(f"{self.path}: {error}") from error


def folded(name: str, table: Tensor) -> dict[str, Tensor]:
    """A table 'n d' of which many rows are equal, as two small tensors: each row once, and which of them stands where.

    Exact. `TensorFile` shows the whole table again; other programs do not, so such files are only for our own.
    """
    rows, places = table.unique(dim=0, return_inverse=True)
    return {name: rows, name + ROWS: places.int()}


def flatten(tree: Any, prefix: str) -> Iterator[tuple[str, Entry]]:
    """Every tensor of nested containers, under its path joined by dots."""
    if isinstance(tree, Entry):
        yield prefix.removesuffix("."), tree
    elif len(prefix) > MAX_NAME:
        raise Malformed(f"its tensors have names beyond {MAX_NAME} characters")
    elif isinstance(tree, dict | list | tuple):
        for name, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from flatten(value, f"{prefix}{name}.")
