"""A folder of training images: which files are taken, which are left out and why, and the captions beside them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff"}
MASK = ".mask.png"  # cat.mask.png is the mask of cat.jpg

Image = TypeVar("Image")


def image_paths(folder: Path, *, recursive: bool = False) -> list[Path]:
    """The image files of a folder by name, without masks and hidden files."""
    return sorted(
        path
        for path in (folder.rglob("*") if recursive else folder.iterdir())
        if path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and not path.name.endswith(MASK)
    )


def read_all(paths: Iterable[Path], read: Callable[[Path], Image], folder: Path) -> dict[Path, Image]:
    """read(path) by path. A warning names each file that cannot be read; ValueError where none is left."""
    images, broken = {}, []
    for path in paths:
        try:
            images[path] = read(path)
        except (ValueError, OSError) as error:
            broken.append(str(error))
    for reason in broken:
        warnings.warn(f"left out: {reason}", stacklevel=4)
    if not images:
        left_out = f"; {len(broken)} were left out, first: {broken[0]}" if broken else ""
        raise ValueError(f"{folder} holds no images that can be read ({', '.join(sorted(SUFFIXES))}){left_out}")
    return images


def captions_beside(path: Path) -> tuple[str, ...]:
    """Those of an image's text file (cat.jpg, cat.txt), one a line."""
    text = path.with_suffix(".txt")
    lines = text.read_text(encoding="utf-8", errors="replace").splitlines() if text.is_file() else []
    return tuple(line.strip() for line in lines if line.strip())
