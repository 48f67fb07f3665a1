"""The pictures that the mini model is measured on: drawings of concepts in several styles."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Drawings:
    """images: uint8 'n 3 h w', transparent parts over white. words: what each shows, without its style: "a red apple".

    concepts: equal for drawings of one thing, whatever the style.
    """

    images: Tensor
    concepts: tuple[str, ...]
    styles: tuple[str, ...]
    words: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.concepts)

    def subset(self, rows: Sequence[int]) -> Drawings:
        """The drawings of these rows, in this order."""
        names = (tuple(values[i] for i in rows) for values in (self.concepts, self.styles, self.words))
        return Drawings(self.images[list(rows)], *names)

    def of_style(self, style: str) -> Drawings:
        """Those of one style."""
        return self.subset([i for i, other in enumerate(self.styles) if other == style])

    def spread(self, most: int) -> Drawings:
        """At most so many of them, evenly spaced, the same at every call."""
        return self.subset(evenly(len(self), most))

    def captions(self) -> list[str]:
        """What is drawn and how: "a red apple, noto style"."""
        return [f"{words}, {style} style" for words, style in zip(self.words, self.styles, strict=True)]

    def is_of(self, concepts: Sequence[str]) -> Tensor:
        """Which drawing shows which of these concepts, bool 'k n' for k concepts."""
        number = {concept: i for i, concept in enumerate(dict.fromkeys((*concepts, *self.concepts)))}
        asked, own = (torch.tensor([number[concept] for concept in some]) for some in (concepts, self.concepts))
        return asked[:, None] == own[None]


def evenly(n: int, most: int) -> list[int]:
    """At most `most` of 0…n-1, evenly spaced, ascending."""
    count = min(n, most)
    return [i * n // count for i in range(count)]
