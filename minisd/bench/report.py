"""What a benchmark reports, as a Markdown table and as JSON."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from minisd.bench.options import BenchOptions
from minisd.bench.pairs import MeasuredCase


@dataclass
class BenchReport:
    """All cases of one benchmark. subject: its command's name. what: one run, in words."""

    subject: str
    what: str
    machine: Mapping[str, str | int]
    options: BenchOptions
    cases: list[MeasuredCase] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def ratios(self) -> dict[str, float]:
        """peer → minisd's time over the peer's: the median of the pairs, and of several cases the largest."""
        largest: dict[str, float] = {}
        for case in self.cases:
            for peer, (median, _, _) in case.ratios().items():
                largest[peer] = max(largest.get(peer, 0.0), median)
        return largest

    def wrong(self) -> list[str]:
        """A sentence for each result of minisd's whose error is larger than allowed; empty where all are right."""
        sentences = []
        for case in self.cases:
            label = " ".join(f"{key} {value}" for key, value in case.label.items())
            for name, result in case.results.items():
                if result.wrong:
                    error, allowed = f"{result.distance:.1e}", f"{result.allowed:.1e}"
                    sentences.append(f"{label}: {name} is off by {error}, {allowed} is allowed")
        return sentences

    # -------------------------------------------------------------------------------------------------------- as text

    def markdown(self) -> str:
        return "\n".join([*self._header(), "", markdown(self.rows()), *(f"\n{note}" for note in self.notes)])

    def _header(self) -> Iterator[str]:
        m, settings = self.machine, f"{self.options.dtype}, {self.options.pairs} pairs"
        yield f"**minisd bench {self.subject}**: {self.what}; {settings}, {m['date']}"
        yield ""
        memory, gpu = f"{m['memory'] / 1e9:.0f} GB", f", {m['gpu']}" if "gpu" in m else ""
        hardware = f"{m['cpu']}, {m['cpus']} CPUs, {m['threads']} threads, {memory}{gpu}"
        versions = [f"{name} {m[name]}" for name in ("minisd", "torch", "diffusers", "openvino", "cuda") if name in m]
        yield f"{hardware}; {m['system']}, Python {m['python']}, {', '.join(versions)}"

    def rows(self) -> list[dict]:
        rows = []
        for case in self.cases:
            ratios = case.ratios()
            for name, result in case.results.items():
                row = {**case.label, "": name}
                if result.failed:
                    rows.append(row | {"seconds": f"failed: {result.failed}"[:80]})
                    continue
                row["seconds"] = f"{result.median:.3g}"
                row["time, minisd / peer"] = _ratio(ratios[name]) if name in ratios else ""
                if case.flop:
                    row["GFLOP/s"] = f"{case.flop / result.median / 1e9:.0f}"
                if case.flop and case.peak_flops:
                    row["of matmul's"] = f"{case.flop / result.median / case.peak_flops:.0%}"
                if result.peak is not None:
                    row["peak (GB)"] = f"{result.peak / 1e9:.2f}"
                if any(r.distance is not None for r in case.results.values()):
                    row["relative error"] = "" if result.distance is None else f"{result.distance:.1e}"
                rows.append(row | result.more)
        return rows

    def as_json(self) -> dict:
        return {
            "subject": self.subject,
            "what": self.what,
            "machine": dict(self.machine),
            "options": {key: _plain(value) for key, value in asdict(self.options).items()},
            "ratios": self.ratios(),
            "wrong": self.wrong(),
            "notes": self.notes,
            "cases": [self._case_json(case) for case in self.cases],
        }

    @staticmethod
    def _case_json(case: MeasuredCase) -> dict:
        results = {}
        for name, result in case.results.items():
            results[name] = asdict(result) | {"median": result.median if result.seconds else None}
            if result.distance is not None and not math.isfinite(result.distance):
                results[name]["distance"] = None  # JSON has no infinity; `wrong` says it
        ratios = {
            peer: dict(zip(("median", "low", "high"), ratio, strict=True)) for peer, ratio in case.ratios().items()
        }
        return {**case.label, "flop": case.flop, "peak_flops": case.peak_flops, "results": results, "ratios": ratios}


def _ratio(ratio: tuple[float, float, float]) -> str:
    median, low, high = ratio
    return f"{median:.2f} ({low:.2f} – {high:.2f})"


def _plain(value):
    return str(value) if isinstance(value, Path) else value


def markdown(rows: Sequence[Mapping[str, object]]) -> str:
    """Rows as a Markdown table; a column that a row lacks is left empty."""
    names = list(dict.fromkeys(name for row in rows for name in row))

    def lines() -> Iterator[str]:
        yield "| " + " | ".join(names) + " |"
        yield "|" + "---|" * len(names)
        for row in rows:
            yield "| " + " | ".join(str(row.get(name, "")) for name in names) + " |"

    return "\n".join(lines())
