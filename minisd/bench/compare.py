"""All cases of a benchmark: random weights written once, contenders selected, one case measured after the other."""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from minisd.bench.machine import machine
from minisd.bench.options import BenchOptions
from minisd.bench.pairs import FLOAT32_ERROR, Case, Contender, measure
from minisd.bench.peers import reference_of, select
from minisd.bench.process import WorkerError
from minisd.bench.report import BenchReport
from minisd.bench.weights import WHOLE, write_random_folder


def compare(
    subject: str,
    what: str,
    contenders: Mapping[str, Contender],
    cases: Sequence[Case],
    options: BenchOptions,
    *,
    networks: Collection[str] = WHOLE,
    float32_error: float = FLOAT32_ERROR,
    matmul_side: int | None = None,
) -> BenchReport:
    """minisd and the peers of the options, in every case, on the same random weights.

    what: one run, in words. networks: those that the contenders load. float32_error: relative error that float32
    results may have. matmul_side: of the matrices whose product is the machine's peak.
    """
    selected, reference = select(contenders, options.peers), reference_of(contenders)
    report = BenchReport(subject, what, machine(options.device), options)
    with tempfile.TemporaryDirectory(prefix="minisd-bench-") as path:
        folder = Path(path)
        write_random_folder(folder, cases[0].config, networks)
        for case in cases:
            try:
                measured = measure(
                    case,
                    selected,
                    folder,
                    options,
                    reference=reference,
                    float32_error=float32_error,
                    matmul_side=matmul_side,
                )
            except WorkerError as error:
                if not report.cases:
                    raise
                report.notes.append(f"{case.label}: minisd failed: {error}")
            else:
                report.cases.append(measured)
    return report
