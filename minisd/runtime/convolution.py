"""The 3×3 convolution in the form that is quick for its size: direct, as one matrix product, or with fewer products."""

from __future__ import annotations

import functools
from itertools import product

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from minisd.runtime.modes import is_transformed, needs_gradient

# numbers: of each part of the pixels that are in work, 32 MB; transformed weights take up to four times as many
SCRATCH = 2**23
# where Winograd's polynomials are known, beside ∞: by 0, ±1, ±2 of Lavin & Gray it rounds twice as coarsely
POINTS = 0, 3 / 4, -3 / 4, 3 / 2, -3 / 2


def conv3x3(x: Tensor, weight: Tensor, bias: Tensor, *, padding: tuple[int, int] = (1, 1)) -> Tensor:
    """F.conv2d(x, weight, bias, padding=padding), up to rounding; x 'b c h w', weight 'o c 3 3'."""
    few = 64 if x.dtype == torch.float32 else 16  # where sums take longer, the reordering shows less
    if x.device.type == "cpu" and padding == (1, 1) and weight.numel() > few * x.numel():
        return conv3x3_as_product(x, weight, bias)
    if fewer_products_are_quicker(x, weight, bias):
        return conv3x3_winograd(x, weight, bias, padding)
    return F.conv2d(x, weight, bias, padding=padding)


def conv3x3_as_product(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """F.conv2d(x, weight, bias, padding=1), of every pixel's 3×3 neighbours laid out in a row.

    For few pixels and many weights: oneDNN reorders all weights of a convolution at every call, and those of a product
    it does not. At 8×8 pixels and 1280 channels that was half of the time.
    """
    windows = F.pad(x, (1, 1, 1, 1)).unfold(2, 3, 1).unfold(3, 3, 1)
    windows = rearrange(windows, "b c h w y x -> b h w (y x c)")
    return rearrange(F.linear(windows, rearrange(weight, "o c y x -> o (y x c)"), bias), "b h w o -> b o h w")


def conv3x3_winograd(x: Tensor, weight: Tensor, bias: Tensor, padding: tuple[int, int] = (1, 1)) -> Tensor:
    """With a quarter of the multiplications: Winograd's minimal filtering, tile by tile (Lavin & Gray 2015, eq. 10-12).

    Each tile of 6×6 pixels and each filter is transformed to 36 numbers; there the convolution is 36 small products, of
    matrices 'tiles c' and 'c o'; their results are transformed back to 4×4 pixels. It rounds twice as coarsely as the
    direct sum (1.2e-6 of the result, in float32, where that has 0.7e-6). No gradient.
    """
    (up, left), (b, c, h, w), o = padding, x.shape, len(weight)
    height, width = h + 2 * up - 2, w + 2 * left - 2
    down, across = -(-height // 4), -(-width // 4)  # tiles, of which the last may go over the edge
    to_input, to_weights, to_output = (torch.from_numpy(matrix).to(x) for matrix in transforms())
    out = x.new_empty(b, 4 * down, 4 * across, o)
    out_tiles = rearrange(out, "b (down y) (across x) o -> y x b down across o", y=4, x=4)

    def tiles(images: slice, rows: slice) -> Tensor:
        """'36 (b down across) c', transformed: of some images, and of some rows of tiles."""
        first, last = 4 * rows.start - up, 4 * rows.stop + 2 - up
        part = rearrange(x[images, :, max(first, 0) : last], "b c h w -> b h w c")
        rest = last - max(first, 0) - part.shape[1]  # rows beyond the picture's last
        part = F.pad(part, (0, 0, left, 4 * across + 2 - left - w, max(-first, 0), rest))
        windows = part.unfold(1, 6, 4).unfold(2, 6, 4)
        return rearrange(to_input @ rearrange(windows, "b d a c y x -> (y x) (b d a c)"), "k (t c) -> k t c", c=c)

    at_once = max(1, SCRATCH // (36 * max(c, o)))  # tiles
    row_step, image_step = min(down, max(1, at_once // across)), max(1, at_once // (down * across))
    filter_step = max(1, 4 * SCRATCH // (36 * c))
    for filters in (slice(i, i + filter_step) for i in range(0, o, filter_step)):
        kernels = rearrange(weight[filters], "o c y x -> (y x) (o c)")
        kernels = rearrange(to_weights @ kernels, "k (o c) -> k c o", c=c)
        for image, row in product(range(0, b, image_step), range(0, down, row_step)):
            images, rows = slice(image, image + image_step), slice(row, min(row + row_step, down))
            there = out_tiles[:, :, images, rows, :, filters]
            products = rearrange(torch.bmm(tiles(images, rows), kernels), "k t o -> k (t o)")
            torch.add((to_output @ products).view(there.shape), bias[filters], out=there)
    return rearrange(out[:, :height, :width], "b h w o -> b o h w")


@functools.cache
def transforms() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of 6×6 pixels '36 36', of 3×3 weights '36 9', and back to 4×4 sums '16 36', in float64, by Toom and Cook.

    Along one side: 4 sums of 3 pixels each are coefficients of a product of polynomials, known by its values at six
    points.
    """
    points = np.array(POINTS)
    others = [np.delete(points, i) for i in range(5)]
    scale = [np.prod(point - other) for point, other in zip(points, others, strict=True)]
    to_input = np.zeros((6, 6))
    for i, other in enumerate(others):
        to_input[i, :5] = np.poly(other)[::-1]  # Π (x - p), lowest power first: zero at all other points
    to_input[5] = np.poly(points)[::-1]
    infinity = np.eye(6)[5:]
    to_weights = np.concatenate([np.vander(points, 3, increasing=True) / np.array(scale)[:, None], infinity[:, 3:]])
    to_output = np.concatenate([np.vander(points, 4, increasing=True), infinity[:, 2:]]).T
    return tuple(np.kron(side, side) for side in (to_input, to_weights, to_output))


def fewer_products_are_quicker(x: Tensor, weight: Tensor, bias: Tensor) -> bool:
    """Whether conv3x3_winograd is the one to take: on a CPU, in float32, where nothing is learnt.

    By 2 cores with AVX-512, at 2048 pixels and more, it took 0.85 of the direct form's time at 128 channels, 0.55 at
    320 and 0.45 at 640; below either, transforming weights and pixels cost more than it saved.
    """
    if x.device.type != "cpu" or not x.dtype == weight.dtype == torch.float32 or needs_gradient(x, weight, bias):
        return False
    if torch.is_autocast_enabled("cpu") or is_transformed() or not products_are_exact():
        return False
    return min(weight.shape[:2]) >= 128 and len(x) * x.shape[-2] * x.shape[-1] >= 2048


def products_are_exact() -> bool:
    """Whether float32 matrices are multiplied as such: what bfloat16 factors would lose, the transforms amplify."""
    precision = getattr(getattr(torch.backends.mkldnn, "matmul", None), "fp32_precision", "none")  # since torch 2.9
    return torch.get_float32_matmul_precision() == "highest" and precision in ("none", "ieee")
