"""The machine a benchmark runs on: what it is, and how fast it multiplies matrices."""

from __future__ import annotations

import datetime
import os
import platform
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version

import torch

from minisd import __version__
from minisd.bench.process import Run

MATMUL = {"cpu": 4096, "cuda": 8192}  # rows and columns of a matrix


def machine(device: str = "cpu") -> dict[str, str | int]:
    """Processor, threads, versions, date."""
    found = {
        "date": datetime.date.today().isoformat(),
        "cpu": _cpu(),
        "cpus": os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "minisd": __version__,
        "torch": torch.__version__,
    }
    for name in ("diffusers", "transformers", "openvino"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    if torch.device(device).type == "cuda":
        found |= {"gpu": torch.cuda.get_device_name(device), "cuda": str(torch.version.cuda)}
        found["cudnn"] = str(torch.backends.cudnn.version())
    return found


def _cpu() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def matmul(dtype: str, device: str, side: int | None = None) -> Run:
    """The product of two square matrices, whose speed is the machine's own peak. side: None chooses it."""
    side = side or MATMUL.get(torch.device(device).type, 4096)
    a, b = (torch.randn(side, side, device=device, dtype=getattr(torch, dtype)) for _ in range(2))
    return lambda: a @ b


def matmul_flop(device: str, side: int | None = None) -> float:
    return 2.0 * (side or MATMUL.get(torch.device(device).type, 4096)) ** 3


def flop(run: Callable[[], object]) -> int:
    """Floating-point operations of the matrix products and convolutions that run() does; two for multiply and add.

    With tensors on the meta device it computes nothing.
    """
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        run()
    return counter.get_total_flops()
