"""Files that a picture is made from and written to: told from others by a digest, written whole or not at all."""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from minisd.provenance.call import File

BLOCKS, BLOCK = 64, 1 << 16  # of a checkpoint's fingerprint: so many places, so many bytes each
WEIGHTS = (".safetensors", ".bin")


def remember_input(path: Path, folder: Path) -> File:
    """An input picture or an adapter, as a picture in `folder` remembers it."""
    return File(_seen_from(path, folder), sha256(path))


def remember_checkpoint(path: Path, folder: Path) -> File:
    """A checkpoint file or diffusers folder, as a picture in `folder` remembers it."""
    return File(_seen_from(path, folder), fingerprint(path))


def find(file: File, folder: Path) -> Path | None:
    """Where a remembered file lies: seen from the picture's folder, beside the picture, or in the working directory."""
    name = Path(file.name)
    seen = Path(os.path.normpath(folder / name))  # as `_seen_from` reckons: in names, past links
    places = (seen, folder / name.name, name, Path(name.name))
    return next((path for path in places if path.exists()), None)


def find_input(file: File, folder: Path, what: str = "input picture") -> Path:
    """An input picture, or an adapter, of a record. ValueError where it is gone or another."""
    path = find(file, folder)
    if path is None or not path.is_file():
        raise ValueError(f"the {what} {file.name} is not there, seen from {folder}: put it back to replay")
    if sha256(path) != file.digest:
        raise ValueError(f"{path} is not the {what} it was (another SHA-256): put the old one back to replay")
    return path


def sha256(path: Path) -> str:
    """ "sha256:…" of a whole file, of any size."""
    digest = hashlib.sha256()
    try:
        with path.open("rb") as data:
            while block := data.read(1 << 20):
                digest.update(block)
        return "sha256:" + digest.hexdigest()
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from error


def fingerprint(path: Path) -> str:
    """ "sampled-sha256:…" of a checkpoint's sizes and of 64 blocks of each file: tells trainings apart in milliseconds.

    Reading 4 GB would take longer than loading them. A file that differs in a few tensors only may go unnoticed.
    """
    if not path.exists():
        raise ValueError(f"{path}: there is no such file or folder")
    digest = hashlib.sha256()
    files = sorted(p for p in path.rglob("*") if p.suffix in WEIGHTS) if path.is_dir() else [path]
    try:
        for file in files:
            size = file.stat().st_size
            digest.update(f"{file.relative_to(path).as_posix()} {size}\n".encode())
            with file.open("rb") as data:
                for i in range(BLOCKS):
                    data.seek(i * max(size - BLOCK, 0) // (BLOCKS - 1))
                    digest.update(data.read(BLOCK))
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from error
    return "sampled-sha256:" + digest.hexdigest()


def _seen_from(path: Path, folder: Path) -> str:
    """The relative name, so that pictures and their inputs can move together, and no home folder is told."""
    try:
        return Path(os.path.relpath(path, folder)).as_posix()
    except ValueError:  # another drive of Windows
        return path.name


def write_whole(path: Path, write: Callable[[BinaryIO], None]) -> None:
    """Call write(file) on a file beside path, then rename it over path: nothing leaves half of it."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "xb") as out:
            write(out)
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror} (nothing was changed)", str(path)) from error
    finally:
        with suppress(OSError):
            temporary.unlink()
