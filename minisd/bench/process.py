"""A fresh process for everything that is measured, and the memory of a process."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

Run = Callable[[], "Tensor"]  # what is measured
MIN_SECONDS = 0.1  # of a timing: what is shorter is repeated, and the mean taken


class WorkerError(ChildProcessError):
    """What was to be measured could not be run; the message says why. An OSError: the user's to mend, not a bug."""


class Worker:
    """A process that builds one contender, then runs it on request.

    build: called in that process, returns the function that is measured, which returns a tensor. It must be picklable:
    a function of a module, or a partial of one. WorkerError where it raises, or where the process dies.
    """

    def __init__(self, build: Callable[[], Run], device: str = "cpu"):
        context = get_context("spawn")  # a forked child would inherit this process's memory and threads
        self._pool = ProcessPoolExecutor(1, mp_context=context, initializer=_initialize, initargs=(device,))
        self.call(_build, build)

    def output(self) -> np.ndarray:
        """The contender's result in float32; also its warm-up."""
        return self.call(_output)

    def seconds(self) -> float:
        """Seconds of one run."""
        return self.call(_seconds)

    def peak(self) -> int:
        """Peak memory so far in bytes, above that after `import torch`; on a GPU, of its memory."""
        return self.call(_peak)

    def close(self) -> None:
        self._pool.shutdown()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def call(self, function: Callable, *args) -> Any:
        """function(*args) in the worker's process; both must be picklable."""
        try:
            return self._pool.submit(_with_readable_errors, function, *args).result()
        except BrokenProcessPool as error:
            raise WorkerError("its process died, as one does for which the memory does not suffice") from error
        except BaseException:
            self.close()
            raise


def in_fresh_process(function: Callable[[], Any]) -> Any:
    """function() in a fresh process that has imported torch."""
    with Worker(_no_contender) as worker:
        return worker.call(function)


# ------------------------------------------------------------------------------------------ inside the worker's process

_device, _baseline, _run = "cpu", 0, None  # of this process; _baseline: bytes after `import torch`


def _initialize(device: str) -> None:
    global _device, _baseline
    os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "TQDM_DISABLE": "1"}
    import warnings

    import torch

    warnings.simplefilter("ignore")
    torch.set_grad_enabled(False)
    if torch.device(device).type == "cuda":
        torch.cuda.set_device(device)  # whose streams and events time it
    _device, _baseline = device, resident()


def _with_readable_errors(function: Callable, *args) -> Any:
    """function(*args), any error as one that every process can unpickle."""
    try:
        return function(*args)
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        raise WorkerError(f"{type(error).__name__}: {lines[0][:300]}") from error


def _no_contender() -> None:
    return None


def _build(build: Callable[[], Run]) -> None:
    global _run
    _run = build()


def _output() -> np.ndarray:
    return _run().detach().float().cpu().numpy()


def _seconds() -> float:
    once = _mean_seconds(1)
    return once if once >= MIN_SECONDS else _mean_seconds(max(1, round(MIN_SECONDS / max(once, 1e-7))))


def _mean_seconds(repeats: int) -> float:
    import torch

    if torch.device(_device).type != "cuda":
        start = time.perf_counter()
        for _ in range(repeats):
            _run()
        return (time.perf_counter() - start) / repeats
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for _ in range(repeats):
        _run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e-3 / repeats


def _peak() -> int:
    import torch

    if torch.device(_device).type == "cuda":
        return torch.cuda.max_memory_allocated(_device)
    return resident(peak=True) - _baseline


def resident(*, peak: bool = False) -> int:
    """Resident memory of this process in bytes, mapped files included: now, or the most so far.

    The peak is read from Linux itself: psutil does not know it, and getrusage's is inherited from the parent process.
    """
    if not peak:
        return psutil.Process().memory_info().rss
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) * 1024
