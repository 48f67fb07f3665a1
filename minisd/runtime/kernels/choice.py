"""What impl="auto" runs: the form that was measured to be the quickest for this machine and shape, else PyTorch's."""

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
LARGE = 1024 * 40  # numbers in the keys of a head
MANY = 2**20  # scores: below, a kernel's compilation at first use is not worth it
MARGIN = 0.97  # of sdpa's time: differences below 3 % are within the spread of a measurement


def choose(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> str:
    """The name of the form for these tensors: "sdpa" unless measured.json, for GPUs, knows better, or these lines.

    On a CPU PyTorch's backward in bfloat16 took 1.2 to 3.6 times as long as in float32 at the shapes of the mini model
    (2 cores, with AMX and without, torch 2.14), so that training in half precision takes "sdpa32" there; but 0.86 to
    0.94 of that time, and half of the memory, at LARGE keys and more (AVX-512-BF16: 1024 of width 40, 256 of width 160,
    up to 9216 of 40). Its forward took 2.1 times as long as "avx512" in bfloat16 and 1.2 times in float32 at 4096
    tokens of width 40, 2.3 and 1.4 times with 77 keys, by 2 cores with AVX-512-BF16; with AMX it is quick.
    """
    training = needs_gradient(q, k, v)
    (b, n, i, d), m = q.shape, k.shape[1]
    if q.device.type == "cpu":
        if training:
            large = q.dtype == torch.bfloat16 and m * d >= LARGE
            return "sdpa32" if q.dtype.itemsize == 2 and not large else "sdpa"
        plain = not is_transformed() and not torch.is_autocast_enabled("cpu")
        takes = b * i * n * m >= MANY and plain and own_kernel_is_quick()
        takes = takes and why_not_avx512(q, k, v, causal, scale) is None and can_compile(q.dtype, d)
        return "avx512" if takes else "sdpa"
    if q.device.type != "cuda" or causal:
        return "sdpa"
    quickest = _measured(q.device.index or 0, str(q.dtype).removeprefix("torch."), b * i, n, m, d, training)
    ours = quickest in ("fused", "hopper")
    return "sdpa" if ours and why_not_fused(q, k, v, causal, scale, hopper=quickest == "hopper") else quickest


def own_kernel_is_quick() -> bool:
    """Whether this CPU is like the one where "avx512" won: AVX-512-BF16 without AMX."""
    return cpu_has("avx512_bf16") and not cpu_has("amx_tile")


def _measured(device: int, dtype: str, heads: int, n: int, m: int, d: int, training: bool) -> str:
    rows = _rows(torch.cuda.get_device_name(device))
    shape = {"dtype": dtype, "n": n, "m": m, "d": d, "pass": "training" if training else "forward"}
    return quickest([row for row in rows if all(row[key] == value for key, value in shape.items())], heads)


# For torch.compile: shapes are constants, and so is the table. This is what torch.compiler.assume_constant_result sets,
# without its import of the whole compiler, which takes two seconds.
_measured._dynamo_marked_constant = True


def quickest(rows: list[dict], heads: int) -> str:
    """Of rows that differ in their number of heads, the nearest one that does not have more: its quickest form.

    More heads fill a GPU better, for every form alike; fewer may leave it empty for one form and not for another, so
    that nothing is concluded from a larger measurement.
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
