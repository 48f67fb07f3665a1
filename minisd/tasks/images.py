"""Images in and out: PIL images ↔ tensors 'b 3 h w' in [-1, 1]."""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image, ImageOps
from torch import Tensor


def load_image(path: str | os.PathLike) -> Image.Image:
    """An image from a file, upright (EXIF honoured). ValueError where it is none."""
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).copy()
    except FileNotFoundError:
        raise ValueError(f"{path}: there is no such image") from None
    except (OSError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: not a readable image ({error})") from error


def to_tensor(image: Image.Image, size: tuple[int, int] | None = None) -> Tensor:
    """'1 3 h w' in [-1, 1] from any PIL image, transparent parts over white; size (height, width) resizes (Lanczos)."""
    image = _opaque(image, "white").convert("RGB")
    if size is not None and (image.height, image.width) != tuple(size):
        image = image.resize((size[1], size[0]), Image.Resampling.LANCZOS)
    return rearrange(torch.from_numpy(np.array(image)), "h w c -> 1 c h w").float() / 127.5 - 1


def to_mask(mask: Image.Image, size: tuple[int, int]) -> Tensor:
    """'1 1 h w' bool, True where the mask is white (128 or more): the part to repaint. size: (height, width)."""
    mask = _opaque(mask, "black")
    if (mask.height, mask.width) != tuple(size):
        raise ValueError(f"the mask is {mask.width}×{mask.height}, the image {size[1]}×{size[0]}: make them equal")
    return torch.from_numpy(np.array(mask.convert("L")) >= 128)[None, None]


def _opaque(image: Image.Image, background: str) -> Image.Image:
    """Upright (EXIF honoured), 8 bits deep, transparent parts over the background."""
    if not isinstance(image, Image.Image):
        kind = type(image).__name__
        raise ValueError(f"an image is a PIL image, not {kind}: files are opened by minisd.tasks.images.load_image")
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16 bits of grey, which PIL itself would clip at 255
        image = Image.fromarray((np.asarray(image).clip(0, 65535) / 257).round().astype(np.uint8))
    if image.mode == "F":
        raise ValueError("an image of floats has no known range: convert it to 8 bits first")
    if image.has_transparency_data:
        image = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, background), image)
    return image


def to_uint8(images: Tensor) -> Tensor:
    """[-1, 1] → 0…255, 'b 3 h w' uint8, rounded to nearest."""
    return ((images.float() / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)


def to_pil(images: Tensor) -> list[Image.Image]:
    """PIL images of 'b 3 h w' in [-1, 1], or of uint8."""
    images = images if images.dtype == torch.uint8 else to_uint8(images)
    return [Image.fromarray(rearrange(image.cpu(), "c h w -> h w c").numpy()) for image in images]


def pad_to_multiple(x: Tensor, factor: int) -> Tensor:
    """Extend 'b c h w' to the right and below to multiples of factor, by repeating the last row and column."""
    right, below = (-x.shape[-1]) % factor, (-x.shape[-2]) % factor
    return F.pad(x.float(), (0, right, 0, below), mode="replicate").to(x.dtype) if right or below else x


def inward_feather(mask: Tensor, width: int) -> Tensor:
    """Weights 'b 1 h w' in [0, 1]: 0 outside the mask, rising inside it to 1 at `width` pixels from its border.

    In parts too narrow for that they reach 1 in the middle: the depth of a pixel is divided by that of the deepest
    square inside the mask which it belongs to. The image's edge is no border.
    """
    if width < 0:
        raise ValueError(f"feather is {width}: it is a number of pixels, 0 or more")
    inside = mask.float()
    depth, deepest = torch.zeros_like(inside), torch.zeros_like(inside)
    for n in range(max(width, 1)):
        depth += inside
        # where a square of 2n + 1 pixels fits in: opening, one axis after the other
        square = F.max_pool2d(F.max_pool2d(inside, (1, 2 * n + 1), 1, (0, n)), (2 * n + 1, 1), 1, (n, 0))
        deepest += square
        inside = -F.max_pool2d(-inside, 3, stride=1, padding=1)  # one pixel less all round
        if not inside.any():
            break
    return torch.where(mask, depth / deepest, 0.0)


def composite(original: Tensor, painted: Tensor, weight: Tensor) -> Tensor:
    """uint8 'b 3 h w': painted where weight is 1, mixed where it is less, the original's own bits where it is 0."""
    return (original.float() + weight * (painted.float() - original.float())).round().to(torch.uint8)


def grid(images: Sequence[Image.Image], columns: int | None = None) -> Image.Image:
    """All images on one, in cells of one size, about square unless columns are given."""
    if not images:
        raise ValueError("a grid needs at least one image")
    columns = columns or math.ceil(math.sqrt(len(images)))
    rows = -(-len(images) // columns)
    width, height = max(i.width for i in images), max(i.height for i in images)
    sheet = Image.new("RGB", (columns * width, rows * height), "white")
    for n, image in enumerate(images):
        sheet.paste(image, (n % columns * width, n // columns * height))
    return sheet
