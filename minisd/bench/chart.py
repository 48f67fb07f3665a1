"""The chart of a benchmark: time and memory over size or batch, or as bars where neither varies."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from minisd.bench.pairs import MeasuredCase
from minisd.bench.report import BenchReport
from minisd.plots.figures import LARGE, SMALL, new_figure, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

AXES = {"size": "side of the image (pixels)", "batch": "images per batch"}


Amount = Callable[[MeasuredCase, str], float | None]  # of a contender in a case


def draw(reports: Sequence[BenchReport], out: Path) -> Path:
    """`figure` in a file."""
    return save(figure(reports), out)


def figure(reports: Sequence[BenchReport]) -> Figure:
    """One row of panels per benchmark: seconds on the left, peak memory on the right."""
    chart = new_figure(8, 3.2 * len(reports), layout="constrained")
    for row, report in zip(chart.subplots(len(reports), 2, squeeze=False), reports, strict=True):
        for axes, amount, unit in zip(row, (_seconds, _gigabytes), ("seconds", "peak memory (GB)"), strict=True):
            varying = [name for name in AXES if len({case.label.get(name) for case in report.cases}) > 1]
            (_lines if varying else _bars)(axes, report, amount, unit, *varying[:1])
            axes.spines[["top", "right"]].set_visible(False)
            axes.tick_params(labelsize=SMALL)
        row[0].set_title(f"{report.subject}, {report.options.dtype}", fontsize=LARGE, loc="left")
    return chart


def _seconds(case: MeasuredCase, name: str) -> float | None:
    return case.results[name].median if case.results[name].seconds else None


def _gigabytes(case: MeasuredCase, name: str) -> float | None:
    peak = case.results[name].peak
    return None if peak is None else peak / 1e9


def _distinguishing(case: MeasuredCase, report: BenchReport) -> list[tuple[str, str | int]]:
    """The parts of a case's label in which the cases of the report differ."""
    return [(k, v) for k, v in case.label.items() if len({other.label[k] for other in report.cases}) > 1]


def _lines(axes: Axes, report: BenchReport, amount: Amount, unit: str, variable: str) -> None:
    """One line per contender, and per value of every other part of the labels."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    lines: dict[str, list[tuple[int, float]]] = {}
    for case in report.cases:
        rest = [str(v) if isinstance(v, str) else f"{k} {v}" for k, v in _distinguishing(case, report) if k != variable]
        for name in case.results:
            if (y := amount(case, name)) is not None:
                lines.setdefault(", ".join([name, *rest]), []).append((case.label[variable], y))
    for name, points in lines.items():
        axes.plot(*zip(*sorted(points), strict=True), marker="o", markersize=4, label=name)
    values = sorted({case.label[variable] for case in report.cases})
    axes.set_xscale("log", base=2)
    axes.set_xticks(values, [str(value) for value in values])
    axes.xaxis.set_minor_locator(NullLocator())
    if unit == "seconds":  # they span decades; memory starts at that of the weights
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
        axes.yaxis.set_minor_locator(NullLocator())
    else:
        axes.set_ylim(bottom=0)
    axes.set_xlabel(AXES[variable], fontsize=SMALL)
    axes.set_ylabel(unit, fontsize=SMALL)
    axes.grid(alpha=0.3)
    if lines:
        axes.legend(fontsize=SMALL, frameon=False)


def _bars(axes: Axes, report: BenchReport, amount: Amount, unit: str) -> None:
    """One bar per contender and case, the first on top."""
    bars, names = [], dict.fromkeys(name for case in report.cases for name in case.results)
    for case in report.cases:
        label = " ".join(str(value) for _, value in _distinguishing(case, report))
        for name in case.results:
            if (x := amount(case, name)) is not None:
                bars.append((f"{label}, {name}" if label else name, x, name))
    colours = {name: f"C{i}" for i, name in enumerate(names)}
    patches = axes.barh(range(len(bars)), [x for _, x, _ in bars], color=[colours[name] for *_, name in bars])
    axes.bar_label(patches, [f"{x:.3g}" for _, x, _ in bars], padding=3, fontsize=SMALL)
    axes.set_yticks(range(len(bars)), [label for label, *_ in bars])
    axes.margins(x=0.15)
    axes.invert_yaxis()
    axes.set_xlabel(unit, fontsize=SMALL)
