"""Where torch's two file formats keep their pickle and their storages: the zip (since 1.6) and the older plain one."""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from minisd.checkpoints.files.entries import Malformed
from minisd.checkpoints.files.mapped import MappedFile
from minisd.checkpoints.files.pickles import MAX_BYTES, settle, unpickle

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
LEGACY_PROTOCOL = 1001
_CUT_SHORT = "it is cut short, as an interrupted download is: fetch it again"


@dataclass(frozen=True)
class Content:
    """What a file holds, before any tensor is read. tree: plain containers with `Entry` leaves; dropped: names of
    objects that were not built; checksums: record -> (offset, nbytes, CRC-32)."""

    format: str
    tree: Any
    metadata: Mapping[str, str] = field(default_factory=dict)
    dropped: tuple[str, ...] = ()
    checksums: Mapping[str, tuple[int, int, int]] = field(default_factory=dict)


def read_zip(file: MappedFile) -> Content:
    """torch.save since 1.6: TOP/data.pkl, TOP/data/KEY for every storage, all of them stored without compression."""
    records = _zip_records(file)
    pickles = [name for name in records if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise Malformed("it is a zip archive, but not one of torch.save (no data.pkl): unpack it first")
    top = pickles[0].removesuffix("data.pkl")
    if any(name.startswith(top + "code/") for name in records):
        raise Malformed("it is a TorchScript program, not a checkpoint: save its state_dict() with torch.save")
    offset, size, crc = records[pickles[0]]
    if size > MAX_BYTES:
        raise Malformed(f"its pickle has {size >> 20} MiB, more than the {MAX_BYTES >> 20} allowed")
    data = file.bytes(offset, size)
    summed = any(crc for _, _, crc in records.values())  # torch.serialization.set_crc32_options(False) writes zeros
    if summed and zlib.crc32(data) != crc:
        raise Malformed("its pickle does not match its checksum: the file is damaged, fetch it again")
    if top + "byteorder" in records and file.bytes(*records[top + "byteorder"][:2]) != b"little":
        raise Malformed("its byte order is not little-endian: convert it on the machine that wrote it")

    machine = unpickle(io.BytesIO(data))
    starts = {}
    for key, storage in machine.storages.items():
        offset, size, _ = records.get(f"{top}data/{key}", (0, -1, 0))
        if size != storage.nbytes:
            raise Malformed(f"storage {key} should have {storage.nbytes:,} bytes and " + _found(size))
        starts[key] = offset
    tree = settle(machine.value, starts, machine.dropped)
    return Content("torch zip", tree, dropped=tuple(sorted(machine.dropped)), checksums=records if summed else {})


def _found(size: int) -> str:
    return "is missing: the file is damaged" if size < 0 else f"has {size:,}: the file is damaged"


def _zip_records(file: MappedFile) -> dict[str, tuple[int, int, int]]:
    """name -> (offset of its bytes, nbytes, CRC-32), the central directory held against every local header."""
    try:
        archive = zipfile.ZipFile(file.raw)
        listed = archive.infolist()
    except Exception as error:  # zipfile raises far more than BadZipFile on damaged directories
        raise Malformed(f"its zip directory is missing or damaged ({error}); {_CUT_SHORT}") from error
    records = {}
    for info in listed:
        name, offset = info.orig_filename, _local_offset(file, info)
        if name in records or offset + info.file_size > archive.start_dir:
            raise Malformed(f"record {name!r} occurs twice or ends outside the file; {_CUT_SHORT}")
        records[name] = (offset, info.file_size, info.CRC)
    spans = sorted((offset, offset + size) for offset, size, _ in records.values())
    if any(end > begin for (_, end), (begin, _) in pairwise(spans)):
        raise Malformed("records of the zip overlap: the file is damaged, fetch it again")
    return records


def _local_offset(file: MappedFile, info: zipfile.ZipInfo) -> int:
    """Where a record's bytes begin by its local header, which must say the same as the central directory."""
    name = info.orig_filename
    header = file.bytes(info.header_offset, 30) if 0 <= info.header_offset < file.size else b""
    if len(header) < 30 or header[:4] != b"PK\x03\x04":
        raise Malformed(f"record {name!r} is not where the zip directory says; {_CUT_SHORT}")
    _, flags, method, _, _, crc, _, size, name_size, extra_size = struct.unpack("<5H3I2H", header[4:])
    if (method, info.compress_type, flags & 1) != (zipfile.ZIP_STORED, zipfile.ZIP_STORED, 0):
        raise Malformed(f"record {name!r} is compressed or encrypted: unpack the zip and pack it with `zip -0 -r`")
    offset = info.header_offset + 30 + name_size + extra_size
    if offset + info.file_size > file.size:
        raise Malformed(f"record {name!r} ends outside the file; {_CUT_SHORT}")
    if flags & 8:  # torch streams its records: checksum and sizes follow the bytes, and prove where they end
        tail = file.bytes(offset + info.file_size, 8)
        crc, size = int.from_bytes(tail[4:8] if tail[:4] == b"PK\x07\x08" else tail[:4], "little"), info.file_size
    named = file.bytes(info.header_offset + 30, name_size).decode("utf-8" if flags & 0x800 else "cp437", "replace")
    same = named == name and flags == info.flag_bits and info.file_size == info.compress_size
    if not same or crc != info.CRC or size not in (info.file_size, 0xFFFFFFFF):
        raise Malformed(f"the zip directory and record {name!r} disagree: the file is damaged, fetch it again")
    return offset


def read_legacy(file: MappedFile) -> Content:
    """torch.save before 1.6: five pickles in a row (magic, protocol, machine, the object, storage keys), then every
    storage as its length in elements (8 bytes) and its bytes."""
    file.map.seek(0)
    if unpickle(file.map).value != LEGACY_MAGIC:
        raise Malformed("it is a Python pickle, but not one of torch.save: only torch's are read, and none is run")
    if unpickle(file.map).value != LEGACY_PROTOCOL:
        raise Malformed(f"it is of a torch.save protocol other than {LEGACY_PROTOCOL}: save it again")
    system = unpickle(file.map).value
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise Malformed("its byte order is not little-endian: convert it on the machine that wrote it")
    machine = unpickle(file.map)
    keys = unpickle(file.map).value
    texts = isinstance(keys, list) and all(isinstance(key, str) for key in keys)
    if not texts or sorted(keys) != sorted(machine.storages):
        raise Malformed("its list of storages is not the one its pickle uses: the file is damaged, fetch it again")

    starts, position = {}, file.map.tell()
    for key in keys:
        storage = machine.storages[key]
        length = int.from_bytes(file.bytes(position, 8), "little", signed=True)
        starts[key] = position + 8
        position += 8 + storage.nbytes
        if position > file.size:
            raise Malformed(f"its storages end {position - file.size:,} bytes after the file; {_CUT_SHORT}")
        if length * storage.dtype.itemsize != storage.nbytes:
            raise Malformed(
                f"storage {key} should have {storage.nbytes:,} bytes and its length says otherwise: damaged"
            )
    tree = settle(machine.value, starts, machine.dropped)
    return Content("torch legacy", tree, dropped=tuple(sorted(machine.dropped)))
