"""Pictures and captions from a folder: the emoji data set, or any folder of pictures with or without .txt captions."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from minisd.tasks.images import load_image, to_tensor, to_uint8
from minisd.training.captions import compose
from minisd.training.draws import Draws
from minisd.training.folders import captions_beside, image_paths, read_all

VISITS = {  # of a drawing of each group (of another: 1) in one pass over the emoji, beside each scene's one
    "animals-nature": 12,
    "food-drink": 12,
    "objects": 10,
    "travel-places": 10,
    "activities": 10,
    "smileys-emotion": 8,
    "symbols": 4,
    "flags": 4,
    "people-body": 6,
}
# the 169 concepts of these words, jobs and sports, are others once more
VARIANTS = ("man", "woman", "men", "women", "person:", "man:", "woman:")
VARIANT_VISITS = 2
SISTERS = ("fluent", "flat")  # one vendor's drawings in two renderings: they share one style's visits


@dataclass(frozen=True, eq=False)
class Pictures:
    """Square pictures of one size, and what is said of them.

    pixels: uint8 'n h w c', RGB, or RGBA with straight alpha; may be a memory map. captions: for each picture the ways
    to put it, the plainest first; empty tuples where there are none. names: what an error calls them. digest: tells
    data sets apart. visits: how often each is seen in one pass; once where it says nothing.
    """

    pixels: np.ndarray
    captions: tuple[tuple[str, ...], ...]
    names: tuple[str, ...]
    digest: str
    visits: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.pixels)

    @cached_property
    def visited(self) -> Tensor:
        """The rows of one pass, each as often as it is visited, LongTensor 'v'."""
        return torch.repeat_interleave(torch.arange(len(self)), torch.tensor(self.visits or (1,) * len(self)))

    @property
    def size(self) -> int:
        return self.pixels.shape[1]

    def subset(self, rows: Sequence[int]) -> Pictures:
        """The pictures of these rows, in this order."""
        digest = hashlib.sha256(f"{self.digest} {list(rows)}".encode()).hexdigest()[:16]
        captions, names = (tuple(values[i] for i in rows) for values in (self.captions, self.names))
        visits = tuple(self.visits[i] for i in rows) if self.visits else ()
        pixels = self.pixels[list(rows)]
        return replace(self, pixels=pixels, captions=captions, names=names, digest=digest, visits=visits)

    def images(self, rows: Tensor | Sequence[int], device: str | torch.device = "cpu") -> Tensor:
        """'b 3 h w' in [-1, 1], transparent parts over white."""
        rgb, alpha = self.layers(rows, device)
        return over(rgb, alpha, torch.ones(3, device=device).view(1, 3, 1, 1))

    def layers(self, rows: Tensor | Sequence[int], device: str | torch.device = "cpu") -> tuple[Tensor, Tensor]:
        """RGB 'b 3 h w' in [-1, 1] and alpha 'b 1 h w' in [0, 1]."""
        pixels = torch.from_numpy(self.pixels[np.asarray(rows)]).to(device)
        pixels = rearrange(pixels, "b h w c -> b c h w").float() / 255
        alpha = pixels[:, 3:] if pixels.shape[1] == 4 else torch.ones_like(pixels[:, :1])
        return 2 * pixels[:, :3] - 1, alpha

    def check_captions(self) -> None:
        """ValueError where a picture has none."""
        if bare := [name for name, texts in zip(self.names, self.captions, strict=True) if not texts]:
            raise ValueError(
                f"{len(bare)} of {len(self)} pictures have no caption, first: {bare[0]}: put a text file of the same "
                "name beside each (cat.png, cat.txt), one caption a line"
            )


def over(rgb: Tensor, alpha: Tensor, background: Tensor) -> Tensor:
    """A layer composited over a background; colours in [-1, 1], alpha in [0, 1]."""
    return alpha * rgb + (1 - alpha) * background


@dataclass(frozen=True)
class Augmentation:
    """How a picture is varied each time it is seen.

    Attributes:
        background: share of pictures whose transparent parts go over a random colour; white takes the rest.
        zoom: the most by which the size changes, either way, as a factor less 1.
        shift: the most by which it is moved, in sides of the picture.
        flip: whether half of the pictures are mirrored.
    """

    background: float = 0.0
    zoom: float = 0.0
    shift: float = 0.0
    flip: bool = False


def augmented(pictures: Pictures, rows: Tensor, draws: Draws, how: Augmentation) -> Tensor:
    """Varied pictures 'b 3 h w' in [-1, 1]. What comes in from beyond an edge is transparent (RGBA) or repeated."""
    device = draws.device
    rgb, alpha = pictures.layers(rows, device)
    mirror = torch.where(draws.uniform() < 0.5 * how.flip, -1.0, 1.0)
    zoom = torch.exp2(draws.uniform(-1, 1) * np.log2(1 + how.zoom))
    shift = torch.stack([draws.uniform(-how.shift, how.shift) for _ in "xy"], dim=1)
    if how.zoom or how.shift or how.flip:
        stretch = torch.stack([mirror / zoom, 1 / zoom], dim=1)
        matrix = torch.cat([torch.diag_embed(stretch), 2 * shift[:, :, None]], dim=2)
        with torch.autocast(device.type, enabled=False):  # bfloat16 would move pixels by a fifth of their side
            grid = F.affine_grid(matrix, list(rgb.shape), align_corners=False)
        # premultiplied: transparent pixels have colours, too, and must not bleed in
        layer = torch.cat([(rgb + 1) * alpha, alpha], dim=1)
        padding = "zeros" if pictures.pixels.shape[-1] == 4 else "border"
        layer = F.grid_sample(layer, grid, padding_mode=padding, align_corners=False)
        alpha = layer[:, 3:]
        rgb = layer[:, :3] / alpha.clamp(min=1e-6) - 1
    colours = torch.stack([draws.uniform(-1, 1) for _ in "rgb"], dim=1)[:, :, None, None]
    is_white = (draws.uniform() >= how.background)[:, None, None, None]
    return over(rgb, alpha, torch.where(is_white, 1.0, colours))


def load_pictures(folder: str | os.PathLike, *, size: int | None = None, split: str = "train") -> Pictures:
    """A data set folder: one that scripts/build_emoji.py made, or any folder of pictures.

    size: the side to reach: plain pictures are cropped to their middle square and resized (Lanczos); the emoji must
    have it already. split: of the emoji; "train", "subject", "test" or "unseen". Plain folders have no splits.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder}: there is no such folder")
    if is_emoji(folder):
        return load_emoji(folder, size=size, split=split)
    if size is None:
        raise ValueError(f"{folder} holds pictures of any size: say which size they shall have")
    return load_plain(folder, size)


def load_plain(folder: Path, size: int) -> Pictures:
    """The pictures in a folder and below it, in the order of their names.

    Upright (EXIF), in 8 bits, of animations the first frame, transparent parts over white. A text beside a picture
    (cat.png, cat.txt) holds its captions, one a line. What cannot be read is left out with a warning that names it.
    """
    images = read_all(image_paths(folder, recursive=True), lambda path: _square(path, size), folder)
    captions = tuple(captions_beside(path) for path in images)
    names = tuple(path.relative_to(folder).as_posix() for path in images)
    digest = hashlib.sha256(str(size).encode())
    for name, texts, image in zip(names, captions, images.values(), strict=True):
        digest.update(repr((name, texts)).encode() + image.tobytes())
    return Pictures(np.stack(list(images.values())), captions, names, digest.hexdigest()[:16])


def _square(path: Path, size: int) -> np.ndarray:
    """The middle square of a picture file, uint8 'size size 3'. ValueError, naming the file, where it is none."""
    image = load_image(path)
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    try:
        tensor = to_tensor(image.crop((left, top, left + side, top + side)), (size, size))
    except (ValueError, OSError) as error:
        raise ValueError(f"{path}: {error}") from error
    return rearrange(to_uint8(tensor), "1 c h w -> h w c").numpy()


def is_emoji(folder: Path) -> bool:
    """Whether scripts/build_emoji.py made this folder."""
    return (folder / "images.npy").exists()


def read_records(folder: Path) -> list[dict]:
    """What is said of each picture of the emoji, in their order: concept, style, label, tags, group, split …"""
    lines = (folder / "captions.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def load_emoji(folder: Path, *, size: int | None = None, split: str = "train") -> Pictures:
    """A split of the data set that scripts/build_emoji.py made. ValueError where its files do not fit each other."""
    records = read_records(folder)
    try:
        pixels = np.load(folder / "images.npy", mmap_mode="r")
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder / 'images.npy'}: cannot be read ({error}): build the data set again") from error
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[1] != pixels.shape[2] or pixels.shape[3] != 4:
        raise ValueError(f"{folder / 'images.npy'} holds {pixels.dtype} {pixels.shape}: uint8 'n s s 4' is expected")
    if len(pixels) != len(records):
        raise ValueError(f"{folder} has {len(pixels)} pictures and {len(records)} captions: build the data set again")
    if size is not None and pixels.shape[1] != size:
        raise ValueError(
            f"{folder} holds pictures of {pixels.shape[1]} px, the recipe wants {size}: build them with --size {size}"
        )
    rows = [i for i, record in enumerate(records) if record["split"] == split]
    if not rows:
        known = ", ".join(sorted({record["split"] for record in records}))
        raise ValueError(f"{folder} has no pictures of the split {split!r}; known: {known}")
    data = hashlib.sha256((folder / "data.json").read_bytes()).hexdigest()[:16]
    names = tuple(f"{record['concept']} ({record['style']})" for record in records)
    visits = tuple(visits_of(record) for record in records)
    return Pictures(pixels, tuple(compose(record) for record in records), names, data, visits).subset(rows)


def visits_of(record: Mapping) -> int:
    """How often a drawing of the emoji is seen in one pass: common things more than a job in its third form."""
    is_variant = record["group"] == "people-body" and record["label"].lower().split()[0] in VARIANTS
    visits = VARIANT_VISITS if is_variant else VISITS.get(record["group"], 1)
    return visits // 2 if record["style"] in SISTERS else visits
