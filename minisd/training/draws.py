"""All chance in a training, as a function of (seed, step): no generator is ever saved, and none can be out of step.

Every process draws the numbers of the whole batch and keeps those of its own rows. So a picture meets the same noise
wherever it is computed: on one process or eight, in one piece or in micro-batches, before a crash or after it.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache

import torch
from torch import Tensor


def generator(*key: object, device: str | torch.device = "cpu") -> torch.Generator:
    """A generator of its own for every key, such as ("noise", seed, step)."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    # 32 bits: all that the CPU's Mersenne twister takes from a seed
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:4], "little"))


class Draws:
    """The random numbers of one step, for the rows of one micro-batch, in the order in which they are asked for.

    batch: rows of the whole step. rows: the slice of them that is computed here. device: where the numbers are drawn;
    other devices have other numbers.
    """

    def __init__(self, seed: int, step: int, batch: int, rows: slice, device: str | torch.device = "cpu"):
        self.step, self.batch, self.rows, self.device = step, batch, rows, torch.device(device)
        self._generator = generator("draws", seed, step, device=device)

    def normal(self, *shape: int) -> Tensor:
        """N(0, 1), 'b *shape'."""
        return torch.randn((self.batch, *shape), generator=self._generator, device=self.device)[self.rows]

    def uniform(self, low: float = 0.0, high: float = 1.0) -> Tensor:
        """Uniform in [low, high), 'b'."""
        drawn = torch.rand(self.batch, generator=self._generator, device=self.device)
        return low + (high - low) * drawn[self.rows]

    def integers(self, high: int) -> Tensor:
        """Uniform in 0 … high - 1, LongTensor 'b'."""
        return torch.randint(high, (self.batch,), generator=self._generator, device=self.device)[self.rows]


def examples(seed: int, step: int, batch: int, size: int) -> Tensor:
    """Which of `size` examples a step sees, LongTensor 'batch' on the CPU.

    The data are passed over in a new order each time; a batch may end one pass and begin the next.
    """
    first = step * batch
    passes = range(first // size, (first + batch - 1) // size + 1)
    order = torch.cat([_permutation(seed, n, size) for n in passes])
    return order[first - passes[0] * size :][:batch]


@lru_cache(maxsize=4)
def _permutation(seed: int, number: int, size: int) -> Tensor:
    return torch.randperm(size, generator=generator("order", seed, number))
