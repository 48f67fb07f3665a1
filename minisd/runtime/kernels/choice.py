"""What impl="auto" runs: the implementation measured to be the fastest on this machine and shape, else PyTorch's."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import torch
from torch import Tensor

from minisd.runtime.kernels.avx512 import can_compile, cpu_has, why_not_avx512
from minisd.runtime.kernels.fused import why_not_fused
from minisd.runtime.modes import is_transformed, needs_gradient

MEASURED = Path(__file__).with_name("measured.json")
LARGE_KEYS = 1024 * 40  # numbers in the keys of a head, from which the bfloat16 backward is the faster one
MANY_SCORES = 2**20  # below, compiling the CPU kernel at first use does not pay
MARGIN = 0.97  # of sdpa's time: differences below 3 % are within the spread of a measurement


def choose(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> str:
    """The implementation for these tensors: "sdpa", unless a measurement says otherwise (BENCHMARKS.md has them).

    GPUs: the fastest by measured.json. CPUs: "sdpa32" for training in half precision over few keys, where PyTorch's
    backward is slow; "avx512" for sampling over many scores, on CPUs with AVX-512-BF16 and no AMX.
    """
    training = needs_gradient(q, k, v)
    (b, n, i, d), m = q.shape, k.shape[1]
    if q.device.type == "cpu":
        if training:
            large = q.dtype == torch.bfloat16 and m * d >= LARGE_KEYS
            return "sdpa32" if q.dtype.itemsize == 2 and not large else "sdpa"
        plain = not is_transformed() and not torch.is_autocast_enabled("cpu")
        faster = b * i * n * m >= MANY_SCORES and plain and own_kernel_is_quick()
        runs = faster and why_not_avx512(q, k, v, causal, scale) is None and can_compile(q.dtype, d)
        return "avx512" if runs else "sdpa"
    if q.device.type != "cuda" or causal:
        return "sdpa"
    fastest = _measured(q.device.index or 0, str(q.dtype).removeprefix("torch."), b * i, n, m, d, training)
    ours = fastest in ("fused", "hopper")
    return "sdpa" if ours and why_not_fused(q, k, v, causal, scale, hopper=fastest == "hopper") else fastest


def own_kernel_is_quick() -> bool:
    """Whether this CPU is like the one where "avx512" was: AVX-512-BF16 without AMX."""
    return cpu_has("avx512_bf16") and not cpu_has("amx_tile")


def _measured(device: int, dtype: str, heads: int, n: int, m: int, d: int, training: bool) -> str:
    rows = _rows(torch.cuda.get_device_name(device))
    shape = {"dtype": dtype, "n": n, "m": m, "d": d, "pass": "training" if training else "forward"}
    return fastest_of([row for row in rows if all(row[key] == value for key, value in shape.items())], heads)


# For torch.compile, to which shapes are constants, and so is the table. torch.compiler.assume_constant_result would set
# this too, but it imports the whole compiler.
_measured._dynamo_marked_constant = True


def fastest_of(rows: list[dict], heads: int) -> str:
    """The fastest implementation of the row with the most heads, but not more than `heads`.

    More heads fill a GPU better, for every implementation alike; fewer may leave it idle for one and not for another,
    so that a larger measurement says nothing.
    """
    row = max((row for row in rows if row["heads"] <= heads), key=lambda row: row["heads"], default=None)
    if row is None:
        return "sdpa"
    best = min(row["us"], key=row["us"].get)
    return best if row["us"][best] < MARGIN * row["us"]["sdpa"] else "sdpa"


@functools.cache
def _rows(gpu: str) -> list[dict]:
    tables = json.loads(MEASURED.read_text())["tables"]
    return [row for table in tables if table["gpu"] == gpu for row in table["rows"]]
