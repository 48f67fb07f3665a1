"""How a benchmark measures, in plain values: the command line makes options of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from minisd.config import ModelConfig


def _separated(kind: Callable) -> Parameter:
    """An option of several values, separated by commas."""

    def convert(type_, tokens: Sequence) -> tuple:
        return tuple(kind(word) for token in tokens for word in token.value.split(",") if word)

    return Parameter(converter=convert, n_tokens=1, accepts_keys=False)


Numbers = Annotated[tuple[int, ...], _separated(int)]
Names = Annotated[tuple[str, ...] | None, _separated(str)]


@Parameter(name="*")
@dataclass(frozen=True)
class Options:
    """What every benchmark takes.

    Attributes:
        dtype: of the weights and of what runs through them.
        peers: what to measure beside minisd, separated by commas; when left out, all that is installed, but
            for diffusers-compiled, which takes minutes.
        pairs: how often each is measured, in turn.
        device: cpu, cuda, cuda:1 …
        json: also write every figure to this .json file.
        plot: also draw time and memory, as this .png, .svg or .pdf file.
    """

    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    peers: Names = None
    pairs: int = 5
    device: str = "cpu"
    json: Path | None = None
    plot: Path | None = None

    def check(self) -> None:
        """ValueError for what cannot be measured, said before anything is made."""
        if self.pairs < 1:
            raise ValueError(f"pairs is {self.pairs}: give 1 or more")


@Parameter(name="*")
@dataclass(frozen=True)
class Pictures(Options):
    """What the benchmarks take in which pictures are made.

    Attributes:
        size: side of the square pictures in pixels; several, separated by commas, show how the cost grows.
        batch: pictures at a time; likewise.
    """

    size: Numbers = (512,)
    batch: Numbers = (1,)

    def cases(self, config: ModelConfig) -> Iterator[tuple[int, int]]:
        """Every (size, batch). ValueError for what cannot be measured, said before anything is made."""
        self.check()
        for name in ("size", "batch"):
            if not (values := getattr(self, name)) or min(values) < 1:
                raise ValueError(f"{name} is {','.join(map(str, values))!r}: give numbers from 1 on, as in 1,2,4")
        for size in self.size:
            if size % (factor := config.vae.factor):
                raise ValueError(f"size {size} is not a multiple of {factor} (the VAE's factor)")
        return product(self.size, self.batch)
