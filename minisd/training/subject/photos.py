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
from minisd.training.draws import generator
from minisd.training.folders import MASK, captions_beside, image_paths, read_all

WHITE = 128  # of 255: a mask that is lighter shows the subject
CLEARLY = 2  # levels of grey by which a pixel of a hash is the lighter one
ALIKE = 12  # of the 256 bits of a hash: copies, scaled or compressed anew, differ in 3, views of one drawing in over 20


@dataclass(frozen=True)
class Views:
    """What is made of each photo before training; a step then draws one of these views.

    Attributes:
        crop: center crop, random crops, or the whole photo padded with white.
        count: random crops per photo.
        least: smallest side of a random crop, as a share of the photo's shorter side.
        flip: add horizontally flipped copies; not for subjects whose left and right differ, such as writing.
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
    images = read_all(image_paths(folder), _opaque, folder)
    captions = tuple(captions_beside(path) for path in images)
    names = tuple(path.name for path in images)
    shown = [_mask(path, image, Path(masks) if masks else None) for path, image in images.items()]
    unmasked = [name for name, mask in zip(names, shown, strict=True) if mask is None]
    if unmasked and (masks or len(unmasked) < len(images)):
        raise ValueError(
            f"{len(unmasked)} of {len(images)} photos have no mask, first: {unmasked[0]}: give all or none"
        )
    for a, b in near_duplicates(list(images.values())):
        warnings.warn(f"{names[a]} and {names[b]} are nearly the same picture: keep one of them", stacklevel=2)

    pixels, shapes = [], []
    for number, (image, mask) in enumerate(zip(images.values(), shown, strict=True)):
        squares = [_square(image, views, seed, number, view) for view in range(views.count)]
        for source, target, fill in ((image, pixels, "white"), (mask, shapes, "black")):
            if source is not None:
                drawn = np.stack([np.asarray(_cut(source, square, size, fill)) for square in squares])
                target.append(np.concatenate([drawn, drawn[:, :, ::-1]]) if views.flip else drawn)
    stack = np.stack(pixels)
    stacked_masks = np.stack(shapes) >= WHITE if shapes else None
    digest = hashlib.sha256(repr((names, list(captions), stack.shape)).encode() + stack.tobytes())
    digest.update(b"" if stacked_masks is None else stacked_masks.tobytes())
    return Photos(stack, stacked_masks, captions, names, digest.hexdigest()[:16])


def _opaque(path: Path) -> Image.Image:
    return Image.fromarray(rearrange(to_uint8(to_tensor(load_image(path))), "1 c h w -> h w c").numpy())


def _mask(path: Path, image: Image.Image, folder: Path | None) -> Image.Image | None:
    file = path.with_name(path.stem + MASK) if folder is None else folder / f"{path.stem}.png"
    if not file.is_file():
        return None
    try:
        mask = to_mask(load_image(file), (image.height, image.width))
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    if not mask.any():
        raise ValueError(f"{file}: the mask is all black: it is white on the subject")
    return Image.fromarray(np.where(mask[0, 0].numpy(), 255, 0).astype(np.uint8))


def _square(image: Image.Image, views: Views, seed: int, number: int, view: int) -> tuple[float, float, float]:
    """Left, top and side of the square that a view shows; it may reach beyond the photo."""
    width, height = image.size
    if views.crop == "whole":
        side = max(width, height)
        return (width - side) / 2, (height - side) / 2, side
    side, corner = float(min(width, height)), [0.5, 0.5]
    if views.crop == "random":
        chance = generator("view", seed, number, view)
        share, *corner = torch.rand(3, generator=chance).tolist()
        side *= views.least + (1 - views.least) * share
    return corner[0] * (width - side), corner[1] * (height - side), side


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
        hashes.append(np.diff(thumbnail) > CLEARLY)
    return [(i, j) for i, j in combinations(range(len(images)), 2) if (hashes[i] != hashes[j]).sum() <= ALIKE]
