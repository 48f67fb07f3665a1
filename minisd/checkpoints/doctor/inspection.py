"""What the doctor found out about a file, as data and as a page of text for a terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field

WIDTH = 100
LABEL = 14
FEW = 5  # names listed without verbose


@dataclass
class Network:
    """One network of a file. dtypes: parameters by dtype; stored: bytes in the file; problem: why it is no network."""

    name: str
    about: str
    tensors: int
    parameters: int
    dtypes: dict[str, int]
    stored: int
    problem: str = ""


@dataclass
class Inspection:
    """The findings of `inspect_checkpoint`. str() is the page that the command line prints.

    problems: why minisd cannot use the file as it is; empty for every healthy file of a kind that it reads (`ok`).
    needs: what running it takes. facts: sentences by label. evidence: (prediction, because), the strongest first.
    used, known (by reason) and unknown account for every tensor; groups counts the tensors and elements of files whose
    networks are not known, by the beginning of the name.
    """

    path: str
    kind: str
    size: int = 0
    format: str = ""
    family: str = ""
    presets: list[str] = field(default_factory=list)
    prediction: str | None = None
    evidence: list[tuple[str, str]] = field(default_factory=list)
    ema_tensors: int = 0
    facts: dict[str, str] = field(default_factory=dict)
    networks: list[Network] = field(default_factory=list)
    tensors: int = 0
    used: int = 0
    known: dict[str, list[str]] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)
    groups: dict[str, tuple[int, int]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    needs: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether minisd can use the file as what it is, once it has what it needs: the exit status of the command."""
        return not self.problems

    def as_dict(self) -> dict:
        """Everything, in types that JSON has."""
        return {"ok": self.ok} | asdict(self)

    def __str__(self) -> str:
        return "\n".join(self.lines())

    def lines(self, *, verbose: bool = False) -> list[str]:
        """At most 100 columns wide, but for paths and tensor names; verbose lists every tensor that is not run."""
        sections = [
            ("", self._head()),
            ("Networks", self._network_table()),
            ("Tensors", self._tensor_lines(verbose)),
            ("To run it", _bullets(self.needs)),
            ("Notes", _bullets(self.notes)),
        ]
        page = []
        for title, lines in sections:
            if lines := list(lines):
                page += ([""] if page else []) + ([title] if title else []) + lines
        return page

    def _head(self) -> Iterator[str]:
        yield from textwrap.wrap(f"{self.path}: {self.kind}", WIDTH, break_long_words=False, break_on_hyphens=False)
        for problem in self.problems:
            yield from _row("PROBLEM", problem)
        if self.size or self.format:
            yield from _row("file", ", ".join(filter(None, [bytes_text(self.size), self.format])))
        if self.family:
            preset = f" (preset {' or '.join(self.presets)})" if self.presets else ""
            yield from _row("family", self.family + preset)
        for label, text in self.facts.items():
            yield from _row(label, text)

    def _network_table(self) -> Iterator[str]:
        if not self.networks:
            return
        yield f"  {'':15}{'tensors':>8}{'parameters':>15}  {'dtype':<9}{'stored':>9}{'float32':>10}"
        for net in self.networks:
            dtype = next(iter(net.dtypes)) if len(net.dtypes) == 1 else "mixed"
            yield _columns(net.name, net.tensors, net.parameters, dtype, net.stored) + f"  {net.about}"
            if len(net.dtypes) > 1:
                counts = ", ".join(f"{count:,} {dtype}" for dtype, count in net.dtypes.items())
                yield from _wrapped(f"its parameters are {counts}", 17)
            if net.problem:
                yield from _wrapped(net.problem, 17)
        if len(self.networks) > 1:
            tensors, parameters, stored = (
                sum(getattr(net, name) for net in self.networks) for name in ("tensors", "parameters", "stored")
            )
            yield _columns("together", tensors, parameters, "", stored)

    def _tensor_lines(self, verbose: bool) -> Iterator[str]:
        if self.tensors:
            yield f"  {self.tensors:7,}  in all"
        if self.used:
            yield f"  {self.used:7,}  used" + (" by the networks above" if self.networks else "")
        for reason, names in self.known.items():
            yield f"  {len(names):7,}  not run: {reason}"
            yield from (f"{'':11}{name}" for name in names if verbose)
        if self.used or self.unknown:
            yield f"  {len(self.unknown):7,}  unknown" + (", not run:" if self.unknown else "")
        yield from (f"{'':11}{name}" for name in (self.unknown if verbose else self.unknown[:FEW]))
        if len(self.unknown) > FEW and not verbose:
            yield f"{'':11}… and {len(self.unknown) - FEW:,} more"
        for prefix, (tensors, elements) in list(self.groups.items())[: None if verbose else 12]:
            yield f"  {tensors:7,}  in {prefix or 'a bare tensor'} ({elements:,} elements)"
        if len(self.groups) > 12 and not verbose:
            yield f"{'':11}… and {len(self.groups) - 12:,} more groups"


def few(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:5]) + (f", … and {len(names) - 5} more" if len(names) > 5 else "")


def bytes_text(count: int) -> str:
    """4265215848 → "4.27 GB", decimal, as file managers count."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count} bytes"


def _columns(name: str, tensors: int, parameters: int, dtype: str, stored: int) -> str:
    return f"  {name:15}{tensors:8,}{parameters:15,}  {dtype:<9}{bytes_text(stored):>9}{bytes_text(4 * parameters):>10}"


def _row(label: str, text: str) -> Iterator[str]:
    first, *rest = _wrapped(text, LABEL + 2)
    yield f"  {label:<{LABEL}}{first.lstrip()}"
    yield from rest


def _bullets(texts: list[str]) -> Iterator[str]:
    for text in texts:
        first, *rest = _wrapped(text, 4)
        yield f"  - {first.lstrip()}"
        yield from rest


def _wrapped(text: str, indent: int) -> list[str]:
    space = " " * indent
    lines = textwrap.wrap(
        text, WIDTH, initial_indent=space, subsequent_indent=space, break_long_words=False, break_on_hyphens=False
    )
    return lines or [space]
