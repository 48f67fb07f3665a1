"""What a benchmark says: a Markdown table, JSON, a picture."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from minisd.bench.options import Options
from minisd.bench.pairs import Measured


@dataclass
class Report:
    """The cases of one subject. what: in words, what one run is."""

    subject: str
    what: str
    machine: Mapping[str, str | int]
    options: Options
    cases: list[Measured] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def ratios(self) -> dict[str, float]:
        """peer → minisd's time over the peer's: the median of the pairs, and of several cases the largest."""
        found: dict[str, float] = {}
        for case in self.cases:
            for peer, (median, _, _) in case.ratios().items():
                found[peer] = max(found.get(peer, 0.0), median)
        return found

    def wrong(self) -> list[str]:
        """Sentences about results of minisd that are further off than they may be; empty where all is well."""
        found = []
        for case in self.cases:
            where = " ".join(f"{key} {value}" for key, value in case.label.items())
            for name, result in case.results.items():
                if result.wrong:
                    found.append(f"{where}: {name} is off by {result.distance:.1e}, {result.allowed:.1e} is allowed")
        return found

    # -------------------------------------------------------------------------------------------------------- as text

    def markdown(self) -> str:
        return "\n".join([*self._header(), "", markdown(self.rows()), *(f"\n{note}" for note in self.notes)])

    def _header(self) -> Iterator[str]:
        m, how = self.machine, f"{self.options.dtype}, {self.options.pairs} pairs"
        yield f"**minisd bench {self.subject}**: {self.what}; {how}, {m['date']}"
        yield ""
        place = f"{m['cpu']}, {m['cpus']} CPUs, {m['threads']} threads" + (f", {m['gpu']}" if "gpu" in m else "")
        versions = [f"{name} {m[name]}" for name in ("minisd", "torch", "diffusers", "openvino", "cuda") if name in m]
        yield f"{place}; {m['system']}, Python {m['python']}, {', '.join(versions)}"

    def rows(self) -> list[dict]:
        rows = []
        for case in self.cases:
            ratios = case.ratios()
            for name, result in case.results.items():
                row = {**case.label, "": name}
                if result.failed:
                    rows.append(row | {"seconds": f"cannot: {result.failed}"[:80]})
                    continue
                row["seconds"] = f"{result.median:.3g}"
                row["minisd's time over it"] = _ratio(ratios[name]) if name in ratios else ""
                if case.flop:
                    row["GFLOP/s"] = f"{case.flop / result.median / 1e9:.0f}"
                if case.flop and case.peak_flops:
                    row["of the matrix product's"] = f"{case.flop / result.median / case.peak_flops:.0%}"
                if result.peak is not None:
                    row["peak (GB)"] = f"{result.peak / 1e9:.2f}"
                if any(r.distance is not None for r in case.results.values()):
                    row["off by"] = "" if result.distance is None else f"{result.distance:.1e}"
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
    def _case_json(case: Measured) -> dict:
        results = {}
        for name, result in case.results.items():
            results[name] = asdict(result) | {"median": result.median if result.seconds else None}
            if result.distance is not None and not math.isfinite(result.distance):
                results[name]["distance"] = None  # JSON has no infinity; `wrong` says it
        ratios = {
            peer: dict(zip(("median", "low", "high"), found, strict=True)) for peer, found in case.ratios().items()
        }
        return {**case.label, "flop": case.flop, "peak_flops": case.peak_flops, "results": results, "ratios": ratios}


def _ratio(found: tuple[float, float, float]) -> str:
    median, low, high = found
    return f"{median:.2f} ({low:.2f} – {high:.2f})"


def _plain(value):
    return str(value) if isinstance(value, Path) else value


def markdown(rows: Sequence[Mapping[str, object]]) -> str:
    """Rows as a Markdown table; a value that a row lacks is left empty."""
    names = list(dict.fromkeys(name for row in rows for name in row))

    def lines() -> Iterator[str]:
        yield "| " + " | ".join(names) + " |"
        yield "|" + "---|" * len(names)
        for row in rows:
            yield "| " + " | ".join(str(row.get(name, "")) for name in names) + " |"

    return "\n".join(lines())


def publish(reports: Iterable[Report], options: Options) -> int:
    """Print tables and write what was asked for; 1 where a result of minisd is wrong, else 0.

    Reports may be measured while they are asked for: where the last is never done, the others are printed and written.
    """
    done = []
    for report in reports:
        print(report.markdown() + "\n", flush=True)
        done.append(report)
        if options.json is not None:
            write_json(done, options.json)
    if options.plot is not None:
        from minisd.bench.picture import draw

        print(draw(done, options.plot))
    wrong = [f"{report.subject}, {sentence}" for report in done for sentence in report.wrong()]
    for sentence in wrong:
        print(f"WRONG RESULT: {sentence}")
    return 1 if wrong else 0


def write_json(reports: Sequence[Report], path: Path) -> None:
    from minisd.files import write_whole

    found = [report.as_json() for report in reports]
    text = json.dumps(found[0] if len(found) == 1 else joined(found), indent=1, allow_nan=False)
    write_whole(path, lambda file: file.write(text.encode()))


def joined(found: list[dict]) -> dict:
    """The JSON of several subjects: each under its name, its ratios also as "subject peer"."""
    ratios = {f"{one['subject']} {peer}": ratio for one in found for peer, ratio in one["ratios"].items()}
    return {"ratios": ratios, "subjects": {one["subject"]: one for one in found}}
