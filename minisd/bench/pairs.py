"""One case measured: minisd and its peers in turn, pair by pair, and what they compute held against each other."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from math import comb
from pathlib import Path
from typing import Protocol

import numpy as np

from minisd.bench.machine import matmul, matmul_flop
from minisd.bench.options import Options
from minisd.bench.process import Failed, Run, Worker

COVERAGE = 0.9  # of the intervals of medians
FLOAT32_DISTANCE = 2e-5  # relative, of two correct float32 implementations at the official size
NO_FURTHER = 1.1  # × the judge's own distance: two roundings of the same arithmetic differ by chance


class Case(Protocol):
    """What is computed: a frozen dataclass. label: what tells it from the other cases, e.g. {"size": 512}."""

    dtype: str

    @property
    def label(self) -> dict[str, str | int]: ...

    def flop(self) -> float | None:
        """Operations of one run, where they can be counted."""


# A contender: from the folder with the weights, and what to compute, to the function that is measured.
Program = Callable[[Path, Case], Run]


@dataclass
class Result:
    """One contender in one case. seconds: of each pair. distance: relative, of its result from what counts as right.

    allowed: the distance beyond which it is wrong, None for peers. own: of minisd's, but not what is held against the
    peers. more: what else its subject knows of it, by the column's name.
    """

    seconds: list[float] = field(default_factory=list)
    peak: int | None = None  # bytes
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
class Measured:
    """One case, measured. flop: of one run, where it is known. peak_flops: a second, of a matrix product here."""

    label: dict[str, str | int]
    results: dict[str, Result]
    flop: float | None = None
    peak_flops: float | None = None

    def ratios(self) -> dict[str, tuple[float, float, float]]:
        """peer → minisd's time over the peer's, pair by pair: (median, its interval's ends)."""
        ours = self.results["minisd"].seconds
        peers = {name: r.seconds for name, r in self.results.items() if name != "minisd" and r.seconds and not r.own}
        return {name: interval([a / b for a, b in zip(ours, theirs, strict=True)]) for name, theirs in peers.items()}


def interval(values: list[float]) -> tuple[float, float, float]:
    """The median and an interval of it that needs no distribution: two of the values, in order (binomial, COVERAGE).

    Fewer than five values cannot reach the coverage: theirs goes from the least to the largest.
    """
    ordered, n, outside, drop = sorted(values), len(values), 1 / 2 ** len(values), 0
    while 2 * (drop + 1) < n and 1 - 2 * (outside + comb(n, drop + 1) / 2**n) >= COVERAGE:
        drop += 1
        outside += comb(n, drop) / 2**n
    return statistics.median(ordered), ordered[drop], ordered[n - 1 - drop]


def measure(
    case: Case,
    programs: Mapping[str, Program],
    folder: Path,
    options: Options,
    *,
    reference: Program | None = None,
    float32_distance: float = FLOAT32_DISTANCE,
    matmul_side: int | None = None,
) -> Measured:
    """The programs' times, peaks and distances in one case; "minisd" is one of them.

    reference: the program whose result in float32 counts as right; its process ends before times are taken, unless it
    is one of those that are measured. Failed where minisd fails; a peer's failure is kept in its Result.
    """
    found = Measured(case.label, {name: Result() for name in programs}, case.flop())
    expected = None
    if reference is not None and not (case.dtype == "float32" and reference in programs.values()):
        try:
            with Worker(partial(reference, folder, replace(case, dtype="float32")), options.device) as worker:
                expected = worker.output()
        except Failed as error:
            say(found, f"no result in float32 to compare with: {error}")
    with ExitStack() as stack:
        workers, outputs = {}, {}
        for name, program in programs.items():
            try:
                worker = stack.enter_context(Worker(partial(program, folder, case), options.device))
                outputs[name] = worker.output()
                workers[name] = worker
            except Failed as error:
                if name == "minisd":
                    raise
                found.results[name] = failed(found, name, error)
            if program is reference and expected is None:
                expected = outputs.get(name)
        if expected is not None:
            for name, output in outputs.items():
                found.results[name].distance = distance(output, expected)
            judged = next((r.distance for name, r in found.results.items() if programs[name] is reference), None)
            allowed = float32_distance if case.dtype == "float32" else judged and NO_FURTHER * judged
            found.results["minisd"].allowed = allowed
        product = partial(matmul, options.dtype, options.device, matmul_side)
        product = stack.enter_context(Worker(product, options.device))
        product.output()
        fastest = min(_turns(workers, product, found, options.pairs))
        found.peak_flops = matmul_flop(options.device, matmul_side) / fastest
        for name, worker in workers.items():
            found.results[name].peak = worker.peak()
    return found


def failed(found: Measured, name: str, error: Failed) -> Result:
    say(found, f"{name} cannot: {error}")
    return Result(failed=str(error))


def _turns(workers: dict[str, Worker], product: Worker, found: Measured, pairs: int) -> Iterator[float]:
    """Time everything `pairs` times, every other time in the reverse order; yields seconds of the matrix product.

    A peer that fails is taken out of the workers.
    """
    names = list(workers)
    for i in range(pairs):
        yield product.seconds()
        for name in names if i % 2 == 0 else reversed(names):
            try:
                found.results[name].seconds.append(workers[name].seconds())
            except Failed as error:
                if name == "minisd":
                    raise
                found.results[name] = failed(found, name, error)
                del workers[name]
        names = list(workers)
        times = ", ".join(f"{name} {found.results[name].seconds[-1]:.3g} s" for name in names)
        say(found, f"pair {i + 1} of {pairs}: {times}")


def distance(found: np.ndarray, expected: np.ndarray) -> float:
    """‖found - expected‖ / ‖expected‖."""
    if found.shape != expected.shape:
        return float("inf")
    difference = found.astype(np.float64) - expected
    return float(np.linalg.norm(difference) / np.linalg.norm(expected.astype(np.float64)))


def say(found: Measured, text: str) -> None:
    print(" ".join([*(f"{name} {value}" for name, value in found.label.items()), text]), file=sys.stderr, flush=True)
