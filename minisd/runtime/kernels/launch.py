"""Which instance of a kernel runs, on what grid, and the launch itself, on torch's current stream."""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from minisd.runtime.kernels.nvrtc import ATTENTION, arch_of, compile_kernel

C_NAME = {torch.float16: "Half", torch.bfloat16: "Bf16"}


@dataclass(frozen=True)
class Tile:
    """How a kernel cuts its work: tiles of `n` tokens, walked over by blocks of `warps` warps of `r` · 16 rows each.

    poly: in the forward, every poly-th exponential is taken on the FMA units (0: none).
    """

    n: int
    warps: int = 4
    r: int = 1
    poly: int = 0


@dataclass(frozen=True)
class Tiles:
    """The tiles of one head width: `few` is the forward where all keys fit one tile (Stable Diffusion's 77)."""

    forward: Tile
    few: Tile
    dq: Tile
    dkv: Tile


# None of them spills a register on sm_80 or sm_90a; 32 rows a warp where the registers allow it.
TILES = {
    40: Tiles(Tile(64, r=2), Tile(80), Tile(64), Tile(64)),
    64: Tiles(Tile(32, r=2), Tile(80), Tile(64), Tile(16)),
    80: Tiles(Tile(32, r=2), Tile(80), Tile(32), Tile(32)),
    128: Tiles(Tile(32), Tile(80), Tile(32), Tile(16)),
    160: Tiles(Tile(32), Tile(80), Tile(16), Tile(16)),
}
WIDE = 80  # heads wider than this keep some rows in shared memory (WIDE in attention.cu)


@dataclass(frozen=True)
class Launch:
    """One launch: the instance's C++ name, its grid, threads a block, bytes of dynamic shared memory, and its file."""

    kernel: str
    grid: tuple[int, int, int]
    threads: int
    shared: int
    source: Path = ATTENTION


def forward_launch(q: Tensor, k: Tensor, tile: Tile | None = None) -> Launch:
    """The forward of q 'b n i d' over k 'b m i d', with the tile of its shape, or another."""
    tiles, m = TILES[q.shape[-1]], k.shape[1]
    tile = tile or (tiles.few if m <= tiles.few.n else tiles.forward)
    one_tile = m <= tile.n
    return _launch("forward", q, q.shape[1], tile, f", {str(one_tile).lower()}, {tile.poly}", one_tile)


def backward_launches(q: Tensor, k: Tensor, tiles: Tiles | None = None) -> tuple[Launch, Launch]:
    """dQ, which also writes delta, and then dK and dV."""
    tiles = tiles or TILES[q.shape[-1]]
    return _launch("backward_dq", q, q.shape[1], tiles.dq), _launch("backward_dkv", q, k.shape[1], tiles.dkv)


def _launch(kernel: str, q: Tensor, rows: int, tile: Tile, more: str = "", one_tile: bool = False) -> Launch:
    b, _, heads, d = q.shape
    block = 16 * tile.r * tile.warps
    stored = {"forward": one_tile, "backward_dq": 0, "backward_dkv": 2}[kernel] if d > WIDE else 0
    shared = 2 * (d // 8 | 1) * 8 * ((2 if one_tile else 4) * tile.n + stored * block)
    name = f"{kernel}<{C_NAME[q.dtype]}, {d}, {tile.n}, {tile.warps}, {tile.r}{more}>"
    return Launch(name, (math.ceil(rows / block), heads, b), 32 * tile.warps, shared)


class _View(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), *((name, ctypes.c_longlong) for name in ("batch", "token", "head"))]


class Params(ctypes.Structure):
    """attention.cu's Params. Tensors are 'b n i d' with d contiguous, lse and delta float32 'b i n' and contiguous."""

    TENSORS = ("q", "k", "v", "o", "dout", "dq", "dk", "dv")
    _fields_ = [
        *((name, _View) for name in TENSORS),
        *((name, ctypes.c_void_p) for name in ("lse", "delta")),
        *((name, ctypes.c_int) for name in ("nq", "nk")),
        *((name, ctypes.c_float) for name in ("scale", "scale_log2")),
    ]

    @classmethod
    def of(cls, scale: float, lse: Tensor, delta: Tensor | None = None, **tensors: Tensor) -> Params:
        views = {name: _View(x.data_ptr(), *x.stride()[:3]) for name, x in tensors.items()}
        nq, nk = tensors["q"].shape[1], tensors["k"].shape[1]
        pointers = {"lse": lse.data_ptr(), "delta": None if delta is None else delta.data_ptr()}
        return cls(**views, **pointers, nq=nq, nk=nk, scale=scale, scale_log2=scale * math.log2(math.e))


Launcher = Callable[[Launch, ctypes.Structure], None]


def cuda_launch(launch: Launch, params: ctypes.Structure) -> None:
    """On the current CUDA device and stream. The first launch of an instance compiles it."""
    from cuda.bindings import driver

    function = _loaded(torch.cuda.current_device(), launch.kernel, launch.shared, launch.source)
    arguments = (ctypes.c_void_p * 1)(ctypes.addressof(params))
    stream = torch.cuda.current_stream().cuda_stream
    threads = (launch.threads, 1, 1)
    result = driver.cuLaunchKernel(
        function, *launch.grid, *threads, launch.shared, stream, ctypes.addressof(arguments), 0
    )
    checked(driver, result, launch.kernel)


@functools.cache
def _loaded(device: int, kernel: str, shared: int, source: Path):
    from cuda.bindings import driver

    compiled = compile_kernel(kernel, arch_of(torch.cuda.get_device_capability(device)), source)
    module = checked(driver, driver.cuModuleLoadData(compiled.cubin), kernel)
    function = checked(driver, driver.cuModuleGetFunction(module, compiled.symbol), kernel)
    attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    checked(driver, driver.cuFuncSetAttribute(function, attribute, shared), kernel)
    return function


def checked(driver, result: tuple, kernel: str):
    """The value that a driver call returned; RuntimeError with the driver's message where it failed."""
    if int(result[0]):
        raise RuntimeError(f"CUDA: {driver.cuGetErrorString(result[0])[1].decode()}, for the kernel {kernel}")
    return result[1] if len(result) == 2 else None
