"""How a benchmark measures: plain values, of which the command line makes options."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from minisd.config import ModelConfig


def _comma_separated(kind: Callable) -> Parameter:
    """An option of several values, separated by commas."""

    def convert(type_, tokens: Sequence) -> tuple:
        return tuple(kind(word) for token in tokens for word in token.value.split(",") if word)

    return Parameter(converter=convert, n_tokens=1, accepts_keys=False)


Integers = Annotated[tuple[int, ...], _comma_separated(int)]
Names = Annotated[tuple[str, ...] | None, _comma_separated(str)]


@Parameter(name="*")
@dataclass(frozen=True)
class BenchOptions:
    """What every benchmark takes.

    Attributes:
        dtype: precision of weights and activations
        peers: libraries to compare with, comma-separated, or none; all that are installed when left out
        pairs: timed runs of each contender, taken in turn; the median is reported
        device: cpu, cuda, cuda:1 …
        json: also write every measurement to this .json file
        plot: also draw time and peak memory, as .png, .svg or .pdf
    """

    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    peers: Names = None
    pairs: int = 5
    device: str = "cpu"
    json: Path | None = None
    plot: Path | None = None

    def check(self) -> None:
        """ValueError for what cannot be measured, before anything is built."""
        if self.pairs < 1:
            raise ValueError(f"pairs is {self.pairs}: give 1 or more")


@Parameter(name="*")
@dataclass(frozen=True)
class ImageBenchOptions(BenchOptions):
    """What the benchmarks of images take.

    Attributes:
        size: side of the square images in pixels; several, as in 256,512,1024, show how the cost grows
        batch: images per batch; several likewise
    """

    size: Integers = (512,)
    batch: Integers = (1,)

    def cases(self, config: ModelConfig) -> Iterator[tuple[int, int]]:
        """Every (size, batch). ValueError for what cannot be measured, before anything is built."""
        self.check()
        for name in ("size", "batch"):
            if not (values := getattr(self, name)) or min(values) < 1:
                raise ValueError(f"{name} is {','.join(map(str, values))!r}: give numbers from 1 on, as in 1,2,4")
        for size in self.size:
            if size % (factor := config.vae.factor):
                raise ValueError(f"size {size} is not a multiple of {factor} (the VAE's factor)")
        return product(self.size, self.batch)
