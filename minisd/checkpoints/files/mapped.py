"""The bytes of one file: as tensors on a private map, or read straight into memory of our own."""

from __future__ import annotations

import mmap
import os
import sys
import threading
import weakref
from collections.abc import Iterator

import torch
from torch import Tensor

from minisd.checkpoints.files.entries import Entry

CHUNK = 16 << 20  # bytes; bounds what a conversion holds of the file besides its result


# Linux: a private, writable map is counted against memory as if all of it were to be written, which a file larger than
# memory and swap fails; this flag leaves that out. Python names it from 3.13 on.
_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)


def _private_map(fileno: int) -> mmap.mmap:
    if sys.platform != "linux":
        return mmap.mmap(fileno, 0, access=mmap.ACCESS_COPY)
    return mmap.mmap(fileno, 0, flags=mmap.MAP_PRIVATE | _NORESERVE, prot=mmap.PROT_READ | mmap.PROT_WRITE)


class MappedFile:
    """One open file. Reading never writes to it, and replacing it on disk does not disturb tensors already taken."""

    def __init__(self, path: str):
        self.raw = open(path, "rb", buffering=0)  # noqa: SIM115 - open as long as this object
        weakref.finalize(self, self.raw.close)
        self._lock = threading.Lock()  # seek and read are two calls
        # Copy-on-write: a tensor edited in place changes its own pages, never the file. The map is never closed by
        # hand: every tensor holds a reference to it, and it goes away with the last of them.
        self.map = _private_map(self.raw.fileno())
        self.size = len(self.map)
        self._source = _private_map(self.raw.fileno())  # of pages that `read` may give back: nobody edits them

    def view(self, entry: Entry) -> Tensor:
        """The tensor on the map itself: nothing is read before it is used. Copied only where it is misaligned."""
        if entry.numel == 0:
            return torch.empty(entry.shape, dtype=entry.dtype)
        if entry.offset % entry.dtype.itemsize:
            return self.read(entry)
        count = entry.nbytes // entry.dtype.itemsize
        flat = torch.frombuffer(self.map, dtype=entry.dtype, count=count, offset=entry.offset)
        return flat.as_strided(entry.shape, entry.stride)

    def read(self, entry: Entry, dtype: torch.dtype | None = None) -> Tensor:
        """A contiguous tensor of its own, converted chunk by chunk; leaves no page of the map resident."""
        dtype = dtype or entry.dtype
        if entry.numel == 0:
            return torch.empty(entry.shape, dtype=dtype)
        if dtype == entry.dtype and entry.is_contiguous:
            out = torch.empty(entry.shape, dtype=dtype)
            self._read_into(out.view(-1), entry.offset)
            return out
        if not entry.is_contiguous or entry.offset % entry.dtype.itemsize:
            stored = torch.empty(entry.nbytes // entry.dtype.itemsize, dtype=entry.dtype)
            self._read_into(stored, entry.offset)
            return stored.as_strided(entry.shape, entry.stride).to(dtype).contiguous()
        # Nine tenths of the time are the system's, handing out memory: a buffer in between would be more of it.
        out = torch.empty(entry.shape, dtype=dtype)
        source = torch.frombuffer(self._source, dtype=entry.dtype, count=entry.numel, offset=entry.offset)
        step = CHUNK // entry.dtype.itemsize
        for start in range(0, entry.numel, step):
            part = source[start : start + step]
            out.view(-1)[start : start + step].copy_(part)
            self._forget(entry.offset + start * entry.dtype.itemsize, part.nbytes)
        return out

    def _forget(self, offset: int, nbytes: int) -> None:
        """Give the pages of a stretch back, of the map that is read and never written; the file keeps them."""
        if hasattr(mmap, "MADV_DONTNEED"):
            begin = offset - offset % mmap.PAGESIZE
            self._source.madvise(mmap.MADV_DONTNEED, begin, offset + nbytes - begin)

    def bytes(self, offset: int, nbytes: int) -> bytes:
        """Up to nbytes from offset on; fewer at the end of the file."""
        with self._lock:
            self.raw.seek(offset)
            data = bytearray()
            while len(data) < nbytes and (part := self.raw.read(nbytes - len(data))):
                data += part
        return bytes(data)

    def chunks(self, offset: int, nbytes: int) -> Iterator[bytes]:
        """The same bytes in pieces of at most CHUNK."""
        for start in range(offset, offset + nbytes, CHUNK):
            yield self.bytes(start, min(CHUNK, offset + nbytes - start))

    def _read_into(self, flat: Tensor, offset: int) -> None:
        view = memoryview(flat.view(torch.uint8).numpy())
        while view:
            count = self._read_at(view, offset)
            if not count:
                raise OSError(f"{self.raw.name}: the file became shorter while it was being read")
            view, offset = view[count:], offset + count

    def _read_at(self, view: memoryview, offset: int) -> int:
        if hasattr(os, "preadv"):
            return os.preadv(self.raw.fileno(), [view], offset)
        with self._lock:
            self.raw.seek(offset)
            return self.raw.readinto(view)
