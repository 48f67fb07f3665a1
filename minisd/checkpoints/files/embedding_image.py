"""A1111's images that carry an embedding: as text in a PNG's chunk, or in the low bits of strips at its sides.

The content is that of the .pt file as JSON, tensors as {"TORCHTENSOR": nested lists}. In the pixels it is compressed,
its low half-bytes in the left strip and its high ones in the right, each XORed with a fixed random sequence; a black
column parts a strip from the image (AUTOMATIC1111's modules/textual_inversion/image_embedding.py).
"""

from __future__ import annotations

import base64
import json
import os
import zlib

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from minisd.checkpoints.files.entries import CheckpointError

CHUNK = "sd-ti-embedding"
MAX_JSON = 1 << 26  # bytes; 75 vectors of 1024 take 1.7 MB


def is_png(path: str | os.PathLike) -> bool:
    try:
        with open(path, "rb") as file:
            return file.read(4) == b"\x89PNG"
    except OSError:
        return False  # the reader of other files says why


def read_image(path: str | os.PathLike) -> tuple[str, Tensor]:
    """(name or "", vectors in float32) of an image. CheckpointError where it carries none, or a bad one."""
    try:
        with Image.open(path) as image:
            image.load()
            text, pixels = image.info.get(CHUNK), np.asarray(image.convert("RGB"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise CheckpointError(f"{path}: not a readable image ({error})") from error
    content = _from_pixels(pixels) if text is None else text
    if content is None:
        raise CheckpointError(f"{path}: an image that carries no embedding, neither as text nor in its pixels")
    try:
        data = json.loads(content if text is None else base64.b64decode(content, validate=True))
        (stored,) = data["string_to_param"].values()
        vectors = torch.tensor(stored["TORCHTENSOR"], dtype=torch.float32)
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError, RuntimeError) as error:
        raise CheckpointError(f"{path}: the embedding in this image is damaged ({error})") from error
    return (data["name"] if isinstance(data.get("name"), str) else ""), vectors


def _from_pixels(pixels: np.ndarray) -> bytes | None:
    """The hidden JSON of an image 'h w 3'; None where there is none."""
    filled = (pixels > 0).all(axis=2)
    if not filled.any():
        return None
    rows, columns = filled.any(axis=1).nonzero()[0], filled.any(axis=0).nonzero()[0]
    low = pixels[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] & 0x0F
    black = (~low.any(axis=(0, 2))).nonzero()[0]
    if len(black) < 2:
        return None
    left, right = low[:, : black[0]], low[:, black[-1] + 1 :]
    if left.shape != right.shape or not left.size:
        return None
    mask = _random_bytes(left.size).reshape(left.shape) & 0x0F
    data = ((right ^ mask) << 4 | (left ^ mask)).tobytes()
    try:
        stream = zlib.decompressobj()
        content = stream.decompress(data, MAX_JSON)
    except zlib.error:
        return None
    return content if stream.eof else None


def _random_bytes(count: int) -> np.ndarray:
    """The linear congruential generator s ← 1664525·s + 1013904223 mod 2³² from 0, each mod 255."""
    # sₙ = c·(1 + a + … + aⁿ⁻¹): running products and sums modulo 2³², without a loop over the pixels
    multiplier, increment = np.uint32(1664525), np.uint32(1013904223)
    powers = np.cumprod(np.full(count, multiplier, dtype=np.uint32), dtype=np.uint32)
    before = np.concatenate([np.ones(1, np.uint32), powers[:-1]])
    states = np.cumsum(before, dtype=np.uint32) * increment
    return (states % 255).astype(np.uint8)
