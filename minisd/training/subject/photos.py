"""The few photos of one subject: cropped, mirrored, with captions and masks where there are some."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from einops import rearrange
from PIL import Image

from minisd.tasks.images import load_image, to_mask, to_tensor, to_uint8
from minisd.training.data import SUFFIXES
from minisd.training.draws import generator

MASK = ".mask.png"
ALIKE = 12  # of the 256 bits of a hash: copies, scaled or compressed anew, differ in 3, views of one drawing in over 20


@dataclass(frozen=True)
class Views:
    """What is made of each photo before training; a step then draws one of these views.

    Attributes:
        crop: the middle square, squares of random place and size, or the whole photo with white added at its sides.
        count: views of each photo; 1 is enough for a crop without chance, mirrored ones are added to them.
        least: of a random square, the smallest side as a share of the photo's shorter one.
        flip: mirror every view, too. Not for subjects whose left and right differ, such as writing.
    """

    crop: Literal["center", "random", "whole"] = "center"
    count: int = 1
    least: float = 0.75
    flip: bool = False

    def __post_init__(self):
        if self.count < 1 or not 0 < self.least <= 1:
            raise ValueError(f"count={self.count}, least={self.least}: count is 1 or more, least a share above 0")
        if self.count > 1 and self.crop != "random":
            raise ValueError(f"{self.count} views of crop {self.crop!r} would all be the same: use crop 'random'")


VIEWS = Views()


@dataclass(frozen=True, eq=False)
class Photos:
    """Views of photos, all of one size.

    pixels: uint8 'n v h w 3'. masks: bool 'n v h w', True on the subject; None where there are none. captions: the ways
    to put each photo, empty where there are none. digest: tells sets of photos apart.
    """

    pixels: np.ndarray
    masks: np.ndarray | None
    captions: tuple[tuple[str, ...], ...]
    names: tuple[str, ...]
    digest: str

    def __len__(self) -> int:
        return len(self.pixels)

    @property
    def size(self) -> int:
        return self.pixels.shape[2]

    def first(self, n: int) -> Photos:
        """The first n photos."""
        masks = None if self.masks is None else self.masks[:n]
        digest = f"{self.digest}, the first {n}"
        return Photos(self.pixels[:n], masks, self.captions[:n], self.names[:n], digest)


def load_photos(
    folder: str | os.PathLike,
    size: int,
    views: Views = Views(),
    *,
    masks: str | os.PathLike | None = None,
    seed: int = 0,
) -> Photos:
    """The photos in a folder, in the order of their names.

    Upright (EXIF), transparent parts over white. A text beside a photo (cat.jpg, cat.txt) holds its captions, one a
    line. A mask is white on the subject: cat.mask.png beside it, or cat.png in the folder `masks`; all photos have one
    or none has. A warning names what cannot be read and is left out; another names photos that are nearly the same,
    which would make one view of the subject count twice. ValueError where nothing is left.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder}: there is no such folder of photos")
    loaded, captions = [], []
    for path in photo_paths(folder):
        try:
            image = load_image(path)
            opaque = Image.fromarray(rearrange(to_uint8(to_tensor(image)), "1 c h w -> h w c").numpy())
        except (ValueError, OSError) as error:
            warnings.warn(f"left out: {error}", stacklevel=2)
            continue
        text = path.with_suffix(".txt")
        lines = text.read_text(encoding="utf-8", errors="replace").splitlines() if text.is_file() else []
        captions.append(tuple(line.strip() for line in lines if line.strip()))
        loaded.append((path, opaque, _mask(path, opaque, Path(masks) if masks else None)))
    if not loaded:
        raise ValueError(f"{folder} holds no photos that can be read ({', '.join(sorted(SUFFIXES))})")
    names = tuple(path.name for path, _, _ in loaded)
    unmasked = [path.name for path, _, mask in loaded if mask is None]
    if unmasked and (masks or len(unmasked) < len(loaded)):
        raise ValueError(
            f"{len(unmasked)} of {len(loaded)} photos have no mask, first: {unmasked[0]}: give all or none"
        )
    for a, b in near_duplicates([image for _, image, _ in loaded]):
        warnings.warn(f"{names[a]} and {names[b]} are nearly the same picture: keep one of them", stacklevel=2)

    pixels, shapes = [], []
    for number, (_, image, mask) in enumerate(loaded):
        squares = [_square(image, views, seed, number, view) for view in range(views.count)]
        for source, target, fill in ((image, pixels, "white"), (mask, shapes, "black")):
            if source is not None:
                drawn = np.stack([np.asarray(_cut(source, square, size, fill)) for square in squares])
                target.append(np.concatenate([drawn, drawn[:, :, ::-1]]) if views.flip else drawn)
    stack = np.stack(pixels)
    found = np.stack(shapes) >= 128 if shapes else None
    digest = hashlib.sha256(repr((names, captions, stack.shape)).encode() + stack.tobytes())
    digest.update(b"" if found is None else found.tobytes())
    return Photos(stack, found, tuple(captions), names, digest.hexdigest()[:16])


def photo_paths(folder: Path) -> list[Path]:
    """The picture files of a folder, without masks and hidden ones, by name."""
    return sorted(
        path
        for path in folder.iterdir()
        if path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and not path.name.endswith(MASK)
    )


def _mask(path: Path, image: Image.Image, folder: Path | None) -> Image.Image | None:
    place = path.with_name(path.stem + MASK) if folder is None else folder / f"{path.stem}.png"
    if not place.is_file():
        return None
    try:
        mask = to_mask(load_image(place), (image.height, image.width))
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error
    if not mask.any():
        raise ValueError(f"{place}: the mask is all black: it is white on the subject")
    return Image.fromarray(np.where(mask[0, 0].numpy(), 255, 0).astype(np.uint8))


def _square(image: Image.Image, views: Views, seed: int, number: int, view: int) -> tuple[float, float, float]:
    """Left, top and side of the square that a view shows; it may reach beyond the photo."""
    width, height = image.size
    if views.crop == "whole":
        side = max(width, height)
        return (width - side) / 2, (height - side) / 2, side
    side, place = float(min(width, height)), [0.5, 0.5]
    if views.crop == "random":
        chance = generator("view", seed, number, view)
        share, *place = torch.rand(3, generator=chance).tolist()
        side *= views.least + (1 - views.least) * share
    return place[0] * (width - side), place[1] * (height - side), side


def _cut(image: Image.Image, square: tuple[float, float, float], size: int, fill: str) -> Image.Image:
    left, top, side = square
    box = (round(left), round(top), round(left + side), round(top + side))
    if min(left, top) < 0:  # PIL itself fills with black
        sheet = Image.new(image.mode, (box[2] - box[0], box[3] - box[1]), fill)
        sheet.paste(image, (-box[0], -box[1]))
        return sheet.resize((size, size), Image.Resampling.LANCZOS)
    return image.resize((size, size), Image.Resampling.LANCZOS, box=box)


def near_duplicates(images: Sequence[Image.Image]) -> list[tuple[int, int]]:
    """Pairs (i, j) of pictures that differ by scale, compression or a little colour at most.

    By difference hashes: where, in a thumbnail in grey, the right one of two neighbours is clearly the lighter.
    """
    hashes = []
    for image in images:
        thumbnail = np.asarray(image.convert("L").resize((17, 16), Image.Resampling.BOX), dtype=int)
        hashes.append(np.diff(thumbnail) > 2)
    return [(i, j) for i, j in combinations(range(len(images)), 2) if (hashes[i] != hashes[j]).sum() <= ALIKE]
