"""All cases of a subject: weights made once, programs chosen, one case measured after the other."""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from minisd.bench.machine import machine
from minisd.bench.options import Options
from minisd.bench.pairs import FLOAT32_DISTANCE, Case, Program, measure
from minisd.bench.peers import chosen, judge
from minisd.bench.process import Failed
from minisd.bench.report import Report
from minisd.bench.weights import WHOLE, write_random_folder


def compare(
    subject: str,
    what: str,
    contenders: Mapping[str, Program],
    cases: Sequence[Case],
    options: Options,
    *,
    networks: Collection[str] = WHOLE,
    float32_distance: float = FLOAT32_DISTANCE,
    matmul_side: int | None = None,
) -> Report:
    """minisd and the peers that the options ask for, in every case, on the same random weights.

    what: in words, what one run is. networks: those that the programs load. float32_distance: what float32 results may
    differ by. matmul_side: of the matrices by whose product the machine is judged.
    """
    programs = chosen(contenders, options.peers)
    report = Report(subject, what, machine(options.device), options)
    with tempfile.TemporaryDirectory(prefix="minisd-bench-") as folder:
        write_random_folder(Path(folder), cases[0].config, networks)
        for case in cases:
            try:
                report.cases.append(
                    measure(case, programs, Path(folder), options, reference=judge(contenders), matmul_side=matmul_side)
                )
            except Failed as error:
                if not report.cases:
                    raise
                report.notes.append(f"{case.label}: minisd cannot: {error}")
    return report
