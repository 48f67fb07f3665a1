"""The rows of the token embedding that a data set uses.

Of CLIP's 49,408 tokens the captions of a small data set hold a few thousand. Only those get rows while training, and
all others share one, `unknown`, which is taught by showing it now and then in place of known tokens. `expand` makes
the full table of it, so that there is one tokenizer for every model.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from minisd.config import CLIPTextConfig
from minisd.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Rows:
    """Which of CLIP's ids have rows of their own, ascending; `unknown` is the row after them."""

    ids: tuple[int, ...]
    vocab_size: int

    @classmethod
    def used_by(
        cls, texts: Iterable[str], tokenizer: Tokenizer, config: CLIPTextConfig, keep: Sequence[str] = ()
    ) -> Rows:
        """The rows of these texts, of BOS, EOS and padding, and of the words to keep (rare ones for DreamBooth)."""
        ids = {config.bos_id, config.eos_id, config.pad_id}
        for text in {*texts, *keep}:
            ids.update(tokenizer.encode(text))
        return cls(tuple(sorted(ids)), config.vocab_size)

    @property
    def unknown(self) -> int:
        return len(self.ids)

    @property
    def unknown_id(self) -> int | None:
        """The first id that has no row of its own; None where every id has one."""
        ids = set(self.ids)
        return next((i for i in range(self.vocab_size) if i not in ids), None)

    @cached_property
    def row_of_id(self) -> Tensor:
        """The row of every id, LongTensor 'vocab_size'."""
        rows = torch.full((self.vocab_size,), self.unknown)
        rows[list(self.ids)] = torch.arange(len(self.ids))
        return rows

    def compact(self, config: CLIPTextConfig) -> CLIPTextConfig:
        """The config of the text encoder while it has these rows only."""
        rows = self.row_of_id
        special = {name: int(rows[getattr(config, name)]) for name in ("bos_id", "eos_id", "pad_id")}
        return replace(config, vocab_size=len(self.ids) + 1, **special)

    def expand(self, table: Tensor) -> Tensor:
        """The full table 'vocab_size d' from the compact one."""
        return table[self.row_of_id.to(table.device)]
