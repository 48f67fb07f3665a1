"""Files that a picture is made from, as its record remembers them, and how they are found again."""

from __future__ import annotations

import os
from pathlib import Path

from minisd.files import fingerprint, sha256
from minisd.provenance.call import File


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


def _seen_from(path: Path, folder: Path) -> str:
    """The relative name, so that pictures and their inputs can move together, and no home folder is told."""
    try:
        return Path(os.path.relpath(path, folder)).as_posix()
    except ValueError:  # another drive of Windows
        return path.name
