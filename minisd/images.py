"""Pictures in and out: PIL images ↔ tensors 'b 3 h w' in [-1, 1]."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor


def load_image(path: str | os.PathLike) -> Image.Image:
    """A picture from a file, upright (EXIF honoured). ValueError where it is none."""
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).copy()
    except FileNotFoundError:
        raise ValueError(f"{path}: there is no such picture") from None
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: not a readable picture ({error})") from error


def to_tensor(image: Image.Image, size: tuple[int, int] | None = None) -> Tensor:
    """'1 3 h w' in [-1, 1] from any PIL image, transparent parts over white; size (height, width) resizes (Lanczos)."""
    image = ImageOps.exif_transpose(image)
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB")
    if size is not None and (image.height, image.width) != size:
        image = image.resize((size[1], size[0]), Image.Resampling.LANCZOS)
    return rearrange(torch.from_numpy(np.array(image)), "h w c -> 1 c h w").float() / 127.5 - 1


def to_mask(mask: Image.Image, size: tuple[int, int]) -> Tensor:
    """'1 1 h w' bool, True where the mask is white (128 or more): the part to repaint. size: (height, width)."""
    mask = ImageOps.exif_transpose(mask)
    if mask.mode in ("RGBA", "LA"):
        mask = Image.alpha_composite(Image.new("RGBA", mask.size, "black"), mask.convert("RGBA"))
    if (mask.height, mask.width) != size:
        raise ValueError(f"the mask is {mask.width}×{mask.height}, the picture {size[1]}×{size[0]}: make them equal")
    return torch.from_numpy(np.array(mask.convert("L")) >= 128)[None, None]


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
    """Weights 'b 1 h w' in [0, 1]: 0 outside the mask, rising inside it to 1 at `width` pixels from its border."""
    inside, total = mask.float(), torch.zeros_like(mask, dtype=torch.float32)
    for _ in range(max(width, 1)):
        total += inside
        inside = -F.max_pool2d(-inside, 3, stride=1, padding=1)  # erode by one pixel; the picture's edge is no border
    return total / max(width, 1)


def composite(original: Tensor, painted: Tensor, weight: Tensor) -> Tensor:
    """uint8 'b 3 h w': painted where weight is 1, mixed where it is less, the original's own bits where it is 0."""
    mixed = (original.float() + weight * (painted.float() - original.float())).round().to(torch.uint8)
    return torch.where(weight > 0, mixed, original)


def grid(images: Sequence[Image.Image], columns: int | None = None) -> Image.Image:
    """All pictures of one size on one sheet, about square unless columns are given."""
    columns = columns or max(1, round(len(images) ** 0.5 + 0.499))
    rows = -(-len(images) // columns)
    width, height = max(i.width for i in images), max(i.height for i in images)
    sheet = Image.new("RGB", (columns * width, rows * height), "white")
    for n, image in enumerate(images):
        sheet.paste(image, (n % columns * width, n // columns * height))
    return sheet
