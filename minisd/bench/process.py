"""A process of one's own for everything that is measured, and the memory of a process."""

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

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

Run = Callable[[], "Tensor"]
TURN = 0.1  # seconds that a turn lasts at least: what is shorter is repeated, and the mean taken


class Failed(ChildProcessError):
    """What was to be measured could not be run; the message says why. An OSError: no fault of the program's."""


class Worker:
    """A process that builds one contender, then runs it whenever it is asked to.

    make: called in that process, gives the function that is measured, which returns a tensor. It must be picklable: a
    function of a module, or a partial of one. Failed where it raises, or where the process dies.
    """

    def __init__(self, make: Callable[[], Run], device: str = "cpu"):
        context = get_context("spawn")  # a forked child would inherit this process's memory and threads
        self._pool = ProcessPoolExecutor(1, mp_context=context, initializer=_begin, initargs=(device,))
        self._ask(_build, make)

    def output(self) -> np.ndarray:
        """What it computes, in float32; also its warming up."""
        return self._ask(_output)

    def seconds(self) -> float:
        """One turn: seconds of a run."""
        return self._ask(_seconds)

    def peak(self) -> int:
        """Bytes at most so far, above those after `import torch`; on a GPU, of its memory."""
        return self._ask(_peak)

    def close(self) -> None:
        self._pool.shutdown()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _ask(self, function: Callable, *args) -> Any:
        try:
            return self._pool.submit(_told, function, *args).result()
        except BrokenProcessPool as error:
            raise Failed("its process died, as one does for which the memory does not suffice") from error
        except BaseException:
            self.close()
            raise


def alone(function: Callable[[], Any]) -> Any:
    """function() in a fresh process that has imported torch."""
    worker = Worker(_nothing)
    with worker:
        return worker._ask(function)


# ------------------------------------------------------------------------------------------ inside the worker's process

_device, _before, _run = "cpu", 0, None


def _begin(device: str) -> None:
    global _device, _before
    os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "TQDM_DISABLE": "1"}
    import warnings

    import torch

    warnings.simplefilter("ignore")
    torch.set_grad_enabled(False)
    if torch.device(device).type == "cuda":
        torch.cuda.set_device(device)  # whose streams and events time it
    _device, _before = device, resident()


def _told(function: Callable, *args) -> Any:
    """function(*args), any error as one that every process can read."""
    try:
        return function(*args)
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        raise Failed(f"{type(error).__name__}: {lines[0][:300]}") from error


def _nothing() -> None:
    return None


def _build(make: Callable[[], Run]) -> None:
    global _run
    _run = make()


def _output() -> np.ndarray:
    return _run().detach().float().cpu().numpy()


def _seconds() -> float:
    once = _timed(1)
    return once if once >= TURN else _timed(max(1, round(TURN / max(once, 1e-7))))


def _timed(times: int) -> float:
    import torch

    if torch.device(_device).type != "cuda":
        start = time.perf_counter()
        for _ in range(times):
            _run()
        return (time.perf_counter() - start) / times
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for _ in range(times):
        _run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e-3 / times


def _peak() -> int:
    import torch

    if torch.device(_device).type == "cuda":
        return torch.cuda.max_memory_allocated(_device)
    return resident(peak=True) - _before


def resident(*, peak: bool = False) -> int:
    """Bytes of this process in memory, now or at most, mapped files included (Linux; the peak alone elsewhere)."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    name = "VmHWM:" if peak else "VmRSS:"
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith(name)) * 1024
