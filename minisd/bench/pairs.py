"""One case measured: minisd and its peers in turn, pair by pair, and their results compared."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from math import comb
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch

from minisd.bench.machine import matmul, matmul_flop
from minisd.bench.options import BenchOptions
from minisd.bench.process import Run, Worker, WorkerError

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

COVERAGE = 0.9  # of the intervals of medians
FLOAT32_ERROR = 2e-5  # relative, between two correct float32 implementations at the official size
ERROR_MARGIN = 1.1  # × the reference's own error in half precision: two roundings of one arithmetic differ by chance


class Case(Protocol):
    """What is computed: a frozen dataclass. label: what tells it from the other cases, as in {"size": 512}."""

    dtype: str

    @property
    def label(self) -> dict[str, str | int]: ...

    def flop(self) -> float | None:
        """Floating-point operations of one run, where they can be counted."""


# (the folder with the weights, what to compute) → the function that is measured.
Contender = Callable[[Path, Case], Run]


@dataclass
class ContenderResult:
    """One contender in one case.

    seconds: of each pair. peak: bytes. distance: relative error of its result. allowed: the error beyond which the
    result is wrong, None for peers. own: another implementation of minisd's, no peer to compare times with. failed: why
    it could not run. more: further columns of the table, by their name.
    """

    seconds: list[float] = field(default_factory=list)
    peak: int | None = None
    distance: float | None = None
    allowed: float | None = None
    own: bool = False
    failed: str = ""
    more: dict[str, float | str] = field(default_factory=dict)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def wrong(self) -> bool:
        return None not in (self.distance, self.allowed) and not self.distance <= self.allowed


@dataclass
class MeasuredCase:
    """One case, measured. flop: of one run, where it is known. peak_flops: of a matrix product here, per second."""

    label: dict[str, str | int]
    results: dict[str, ContenderResult]
    flop: float | None = None
    peak_flops: float | None = None

    def ratios(self) -> dict[str, tuple[float, float, float]]:
        """peer → minisd's time over the peer's, pair by pair: (median, lower and upper end of its interval)."""
        ours = self.results["minisd"].seconds
        peers = {name: r.seconds for name, r in self.results.items() if name != "minisd" and r.seconds and not r.own}
        return {name: interval([a / b for a, b in zip(ours, theirs, strict=True)]) for name, theirs in peers.items()}


def interval(values: list[float]) -> tuple[float, float, float]:
    """The median and a distribution-free interval of it: two order statistics (binomial, COVERAGE).

    Fewer than five values cannot reach the coverage: theirs goes from the least to the largest.
    """
    ordered, n, outside, drop = sorted(values), len(values), 1 / 2 ** len(values), 0
    while 2 * (drop + 1) < n and 1 - 2 * (outside + comb(n, drop + 1) / 2**n) >= COVERAGE:
        drop += 1
        outside += comb(n, drop) / 2**n
    return statistics.median(ordered), ordered[drop], ordered[n - 1 - drop]


def measure(
    case: Case,
    contenders: Mapping[str, Contender],
    folder: Path,
    options: BenchOptions,
    *,
    reference: Contender | None = None,
    float32_error: float = FLOAT32_ERROR,
    matmul_side: int | None = None,
) -> MeasuredCase:
    """The contenders' times, peaks and errors in one case; "minisd" is one of them.

    reference: the contender whose float32 result is taken as exact; its process ends before times are taken, unless it
    is one of those that are measured. WorkerError where minisd fails; a peer's failure is kept in its result.
    """
    measured = MeasuredCase(case.label, {name: ContenderResult() for name in contenders}, case.flop())
    expected = None
    if reference is not None and not (case.dtype == "float32" and reference in contenders.values()):
        try:
            with Worker(partial(reference, folder, replace(case, dtype="float32")), options.device) as worker:
                expected = worker.output()
        except WorkerError as error:
            log(measured, f"no float32 result to compare with: {error}")
    with ExitStack() as stack:
        workers, outputs = {}, {}
        for name, contender in contenders.items():
            try:
                worker = stack.enter_context(Worker(partial(contender, folder, case), options.device))
                outputs[name] = worker.output()
                workers[name] = worker
            except WorkerError as error:
                if name == "minisd":
                    raise
                measured.results[name] = failure(measured, name, error)
            if contender is reference and expected is None:
                expected = outputs.get(name)
        if expected is not None:
            reference_name = next((name for name, contender in contenders.items() if contender is reference), None)
            hold_to(measured, outputs, expected, reference_name, case.dtype, float32_error)
        product = partial(matmul, options.dtype, options.device, matmul_side)
        product = stack.enter_context(Worker(product, options.device))
        product.output()
        fastest = min(_take_turns(workers, product, measured, options.pairs))
        measured.peak_flops = matmul_flop(options.device, matmul_side) / fastest
        for name, worker in workers.items():
            measured.results[name].peak = worker.peak()
    return measured


def hold_to(
    measured: MeasuredCase,
    outputs: Mapping[str, np.ndarray],
    expected: np.ndarray,
    reference: str | None,
    dtype: str,
    float32_error: float = FLOAT32_ERROR,
) -> None:
    """Note every output's relative error, and which error minisd is allowed: about the reference's own in `dtype`."""
    for name, output in outputs.items():
        measured.results[name].distance = relative_error(output, expected)
    own_error = measured.results[reference].distance if reference else None
    allowed = float32_error if dtype == "float32" else own_error and ERROR_MARGIN * own_error
    measured.results["minisd"].allowed = allowed


def failure(measured: MeasuredCase, name: str, error: WorkerError) -> ContenderResult:
    log(measured, f"{name} failed: {error}")
    return ContenderResult(failed=str(error))


def _take_turns(workers: dict[str, Worker], product: Worker, measured: MeasuredCase, pairs: int) -> Iterator[float]:
    """Time everything `pairs` times, every other time in the reverse order; yields seconds of the matrix product.

    A peer that fails is taken out of the workers.
    """
    names = list(workers)
    for i in range(pairs):
        yield product.seconds()
        for name in names if i % 2 == 0 else reversed(names):
            try:
                measured.results[name].seconds.append(workers[name].seconds())
            except WorkerError as error:
                if name == "minisd":
                    raise
                measured.results[name] = failure(measured, name, error)
                del workers[name]
        names = list(workers)
        times = ", ".join(f"{name} {measured.results[name].seconds[-1]:.3g} s" for name in names)
        log(measured, f"pair {i + 1} of {pairs}: {times}")


def relative_error(output: Tensor | np.ndarray, expected: Tensor | np.ndarray) -> float:
    """‖output - expected‖ / ‖expected‖ in float64; infinite where the shapes differ."""
    output, expected = (torch.as_tensor(x).double() for x in (output, expected))
    if output.shape != expected.shape:
        return float("inf")
    return ((output - expected).norm() / expected.norm()).item()


def log(measured: MeasuredCase, text: str) -> None:
    print(" ".join([*(f"{name} {value}" for name, value in measured.label.items()), text]), file=sys.stderr, flush=True)
