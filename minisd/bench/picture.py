"""The picture of a benchmark: time and memory, as they grow with size or batch, or as bars where nothing grows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from minisd.bench.pairs import Measured
from minisd.bench.report import Report
from minisd.plots.figures import LARGE, SMALL, new_figure, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

UNITS = {"size": "side of the picture (pixels)", "batch": "pictures at a time"}


def draw(reports: Sequence[Report], out: Path) -> Path:
    """One row of panels a subject, in one file; see `figure`."""
    return save(figure(reports), out)


def figure(reports: Sequence[Report]) -> Figure:
    """Seconds on the left, peak memory on the right, where it is known."""
    drawn = new_figure(8, 3.2 * len(reports), layout="constrained")
    for row, report in zip(drawn.subplots(len(reports), 2, squeeze=False), reports, strict=True):
        for axes, amount, unit in zip(row, (_seconds, _gigabytes), ("seconds", "peak memory (GB)"), strict=True):
            grows = [name for name in UNITS if len({case.label.get(name) for case in report.cases}) > 1]
            (_lines if grows else _bars)(axes, report, amount, unit, *grows[:1])
            axes.spines[["top", "right"]].set_visible(False)
            axes.tick_params(labelsize=SMALL)
        row[0].set_title(f"{report.subject}, {report.options.dtype}", fontsize=LARGE, loc="left")
    return drawn


def _seconds(case: Measured, name: str) -> float | None:
    return case.results[name].median if case.results[name].seconds else None


def _gigabytes(case: Measured, name: str) -> float | None:
    peak = case.results[name].peak
    return None if peak is None else peak / 1e9


def _lines(axes: Axes, report: Report, amount, unit: str, along: str) -> None:
    """One line a contender, and for every other part of the labels."""
    lines: dict[str, list[tuple[int, float]]] = {}
    for case in report.cases:
        rest = [f"{v}" if k == "way" else f"{k} {v}" for k, v in case.label.items() if k != along]
        for name in case.results:
            if (y := amount(case, name)) is not None:
                lines.setdefault(", ".join([name, *rest]), []).append((case.label[along], y))
    for name, points in lines.items():
        axes.plot(*zip(*sorted(points), strict=True), marker="o", markersize=4, label=name)
    values = sorted({case.label[along] for case in report.cases})
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(values, [str(value) for value in values])
    axes.minorticks_off()
    axes.set_xlabel(UNITS[along], fontsize=SMALL)
    axes.set_ylabel(unit, fontsize=SMALL)
    axes.grid(alpha=0.3)
    if lines:
        axes.legend(fontsize=SMALL, frameon=False)


def _bars(axes: Axes, report: Report, amount, unit: str) -> None:
    """One bar a contender and case, the first on top."""
    several, bars = len(report.cases) > 1, []
    for case in report.cases:
        where = " ".join(str(value) for value in case.label.values())
        for name in case.results:
            if (x := amount(case, name)) is not None:
                bars.append((f"{where}, {name}" if several else name, x, name))
    colours = {name: f"C{i}" for i, name in enumerate(dict.fromkeys(name for *_, name in bars))}
    drawn = axes.barh(range(len(bars)), [x for _, x, _ in bars], color=[colours[name] for *_, name in bars])
    axes.bar_label(drawn, [f"{x:.3g}" for _, x, _ in bars], padding=3, fontsize=SMALL)
    axes.set_yticks(range(len(bars)), [label for label, *_ in bars])
    axes.margins(x=0.15)
    axes.invert_yaxis()
    axes.set_xlabel(unit, fontsize=SMALL)
