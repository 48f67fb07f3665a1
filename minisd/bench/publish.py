"""Where reports go: printed as tables, written as JSON, drawn as a chart."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from minisd.bench.options import BenchOptions
from minisd.bench.report import BenchReport
from minisd.files import write_whole


def publish(reports: Iterable[BenchReport], options: BenchOptions) -> int:
    """Print the tables, write the JSON and the chart of the options; 1 where a result of minisd's is wrong, else 0.

    reports: may measure as it is iterated; where it breaks off, the reports before are printed and written.
    """
    finished = []
    for report in reports:
        print(report.markdown() + "\n", flush=True)
        finished.append(report)
        if options.json is not None:
            write_json(finished, options.json)
    if options.plot is not None:
        from minisd.bench.chart import draw  # matplotlib

        print(draw(finished, options.plot))
    wrong = [f"{report.subject}, {sentence}" for report in finished for sentence in report.wrong()]
    for sentence in wrong:
        print(f"WRONG RESULT: {sentence}")
    return 1 if wrong else 0


def write_json(reports: Sequence[BenchReport], path: Path) -> None:
    subjects = [report.as_json() for report in reports]
    text = json.dumps(subjects[0] if len(subjects) == 1 else joined(subjects), indent=1, allow_nan=False)
    write_whole(path, lambda file: file.write(text.encode()))


def joined(subjects: list[dict]) -> dict:
    """The JSON of several benchmarks: each under its name, its ratios also as "subject peer"."""
    ratios = {f"{one['subject']} {peer}": ratio for one in subjects for peer, ratio in one["ratios"].items()}
    return {"ratios": ratios, "subjects": {one["subject"]: one for one in subjects}}
