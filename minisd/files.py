"""Files and folders: written whole or not at all, and told from one another by a digest. Torch-free."""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

BLOCKS, BLOCK = 64, 1 << 16  # of a checkpoint's fingerprint: so many places, so many bytes each
WEIGHTS = (".safetensors", ".bin")


def write_whole(path: str | os.PathLike, write: Callable[[BinaryIO], None], *, make_folder: bool = True) -> None:
    """Call write(file) on a file beside path, then rename it over path (over what a link points to).

    Whatever fails, the old file stays as it was and nothing is left beside it. OSError names path. make_folder: whether
    the folder is made where it is missing.
    """
    target = Path(os.path.realpath(path))
    temporary = _beside(target)
    try:
        if make_folder:
            target.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "xb") as out:
            write(out)
            out.flush()
            os.fsync(out.fileno())
        os.replace(temporary, target)
    except OSError as error:
        raise _unchanged(error, path) from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def write_whole_folder(path: str | os.PathLike, write: Callable[[Path], None]) -> None:
    """Call write(folder) on a new folder beside path, then rename it to path, which is missing or an empty folder."""
    target = Path(os.path.realpath(path))
    temporary = _beside(target)
    try:
        temporary.mkdir()
        write(temporary)
        if target.is_dir():
            target.rmdir()
        temporary.rename(target)
    except OSError as error:
        raise _unchanged(error, path) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _beside(target: Path) -> Path:
    return target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")


def _unchanged(error: OSError, path: str | os.PathLike) -> OSError:
    return OSError(error.errno, f"{error.strerror} (nothing was changed)", os.fspath(path))


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
