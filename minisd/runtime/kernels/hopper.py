"""The forward for Hopper GPUs (attention_sm90.cu): the text of its instructions, its launch, its tensor maps."""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass

from torch import Tensor

from minisd.runtime.kernels.launch import C_NAME, Launch, Params, checked, cuda_launch
from minisd.runtime.kernels.nvrtc import HERE


@dataclass(frozen=True)
class HopperTile:
    """Tiles of `n` keys in `stages` of shared memory, `groups` warpgroups of 64 queries each."""

    n: int
    groups: int
    stages: int = 2


TILES = {
    40: HopperTile(128, 3),
    64: HopperTile(128, 3),
    80: HopperTile(128, 2),
    128: HopperTile(128, 2),
    160: HopperTile(80, 2),
}


def hopper_launch(q: Tensor, k: Tensor, tile: HopperTile | None = None) -> Launch:
    """The forward of q 'b n i d' over k 'b m i d'."""
    b, n, heads, d = q.shape
    tile = tile or TILES[d]
    block, blocks_of_16 = 64 * tile.groups, math.ceil(d / 16)
    shared = 1024 + 32 * blocks_of_16 * (block + 2 * tile.stages * tile.n) + 256
    name = f"forward_sm90<{C_NAME[q.dtype]}, {d}, {tile.n}, {tile.groups}, {tile.stages}>"
    grid = (math.ceil(n / block), heads, b)
    return Launch(name, grid, 128 * (tile.groups + 1), shared, HERE / "attention_sm90.cu")


class _HopperParams(ctypes.Structure):
    """Sm90Params, whose size is a multiple of its alignment of 64 bytes."""

    _fields_ = [
        ("maps", ctypes.c_ubyte * 128 * 3),
        ("params", Params),
        ("rest", ctypes.c_ubyte * (-ctypes.sizeof(Params) % 64)),
    ]


def cuda_hopper_launch(launch: Launch, params: Params) -> None:
    """As launch.cuda_launch, with the maps by which TMA reads q, k and v."""
    template = launch.kernel[launch.kernel.index("<") + 1 : -1].split(", ")
    (dtype, (d, n, groups, _)), (_, heads, b) = (template[0], map(int, template[1:])), launch.grid
    boxes = (("q", params.nq, 64 * groups), ("k", params.nk, n), ("v", params.nk, n))
    maps = [_tensor_map(getattr(params, name), dtype, (d, m, heads, b), rows) for name, m, rows in boxes]
    filled = _HopperParams(params=params)
    for i, one in enumerate(maps):
        ctypes.memmove(filled.maps[i], one, 128)
    cuda_launch(launch, filled)


def _tensor_map(view, dtype: str, sizes: tuple[int, int, int, int], rows: int) -> bytes:
    """A map of [d, tokens, heads, batch], innermost first, for boxes of 16 columns by `rows` tokens."""
    from cuda.bindings import driver

    kinds = driver.CUtensorMapDataType
    kind = {"Half": kinds.CU_TENSOR_MAP_DATA_TYPE_FLOAT16, "Bf16": kinds.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16}[dtype]
    # the stride of a side of 1 is never used, but has to be one that TMA could use
    strides = [
        2 * s if size > 1 else 16 for s, size in zip((view.token, view.head, view.batch), sizes[1:], strict=True)
    ]
    u64, u32 = driver.cuuint64_t, driver.cuuint32_t
    result = driver.cuTensorMapEncodeTiled(
        kind,
        4,
        view.data,
        [u64(size) for size in sizes],
        [u64(stride) for stride in strides],
        [u32(size) for size in (16, rows, 1, 1)],
        [u32(1)] * 4,
        driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
        driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_32B,
        driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
        driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
    )
    return ctypes.string_at(checked(driver, result, "tensor map").getPtr(), 128)
