"""The machine that a benchmark runs on: what it is, and how fast it multiplies matrices."""

from __future__ import annotations

import datetime
import platform
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version

import psutil
import torch

from minisd import __version__
from minisd.bench.process import Run

MATMUL_SIDE = {"cpu": 4096, "cuda": 8192}  # rows and columns of the matrices


def machine(device: str = "cpu") -> dict[str, str | int]:
    """Processor, memory, threads, versions and date, as they stand in every report."""
    facts = {
        "date": datetime.date.today().isoformat(),
        "cpu": _cpu_name(),
        "cpus": psutil.cpu_count() or 1,
        "memory": psutil.virtual_memory().total,
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "minisd": __version__,
        "torch": torch.__version__,
    }
    for name in ("diffusers", "transformers", "openvino"):
        try:
            facts[name] = version(name)
        except PackageNotFoundError:
            continue
    if torch.device(device).type == "cuda":
        facts |= {"gpu": torch.cuda.get_device_name(device), "cuda": str(torch.version.cuda)}
        facts["cudnn"] = str(torch.backends.cudnn.version())
    return facts


def _cpu_name() -> str:
    """The processor's model, which neither psutil nor `platform` knows on Linux."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def matmul(dtype: str, device: str, side: int | None = None) -> Run:
    """The product of two square matrices, whose speed is taken as the machine's peak. side: None is MATMUL_SIDE."""
    side = side or _matmul_side(device)
    a, b = (torch.randn(side, side, device=device, dtype=getattr(torch, dtype)) for _ in range(2))
    return lambda: a @ b


def matmul_flop(device: str, side: int | None = None) -> float:
    """Floating-point operations of one such product."""
    return 2.0 * (side or _matmul_side(device)) ** 3


def _matmul_side(device: str) -> int:
    return MATMUL_SIDE.get(torch.device(device).type, MATMUL_SIDE["cpu"])


def flop(run: Callable[[], object]) -> int:
    """Floating-point operations of the matrix products and convolutions in run(); a multiply-add counts as two.

    With tensors on the meta device nothing is computed.
    """
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        run()
    return counter.get_total_flops()
