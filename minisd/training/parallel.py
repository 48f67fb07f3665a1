"""Several processes that train one model: `torchrun --nproc-per-node 2` on a script that trains.

Every process computes its rows of the batch, then the gradients are averaged. That is all of data parallelism: the
weights start equal, and equal steps keep them equal. PyTorch's DistributedDataParallel also sends early gradients while
later ones are computed, which pays for networks a hundred times as large; for these one message after the backward pass
is as quick, takes part in the loop where one can see it, and knows nothing of micro-batches or of two players' losses.
Muon, whose steps are dear, shares them out and sends a second one.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.nn.functional import all_gather


@dataclass(frozen=True)
class Processes:
    """The group that trains together: this one's rank, how many there are, and the device of this one."""

    rank: int = 0
    count: int = 1
    device: torch.device = torch.device("cpu")  # noqa: RUF009 (immutable)

    @property
    def is_first(self) -> bool:
        """Whether this one writes the files."""
        return self.rank == 0

    def rows(self, batch: int, part: int, parts: int) -> slice:
        """The rows of the whole batch that micro-batch `part` of `parts` has on this process."""
        size = batch // (self.count * parts)
        start = (self.rank * parts + part) * size
        return slice(start, start + size)

    def check(self, batch: int, parts: int) -> None:
        """ValueError where the batch has no equal parts: their means would not average to the batch's."""
        if parts < 1 or batch < 1 or batch % (self.count * parts):
            raise ValueError(
                f"batch_size {batch} cannot be cut into {self.count} process(es) × gradient_accumulation {parts} equal "
                f"parts: use a multiple of {max(self.count * parts, 1)}"
            )

    @torch.no_grad()
    def average_(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors of one dtype by their means over all processes."""
        self.sum_(tensors)
        if self.count > 1:
            for tensor in tensors:
                tensor /= self.count

    @torch.no_grad()
    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors of one dtype by their sums over all processes, in one message."""
        if self.count == 1 or not tensors:
            return
        message = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(message)
        for tensor, total in zip(tensors, message.split([t.numel() for t in tensors]), strict=True):
            tensor.copy_(total.view_as(tensor))

    def wait(self) -> None:
        """Until every process has come here: what the first one writes to disk is then there for all."""
        if self.count > 1:
            dist.barrier()

    def gather(self, x: Tensor) -> Tensor:
        """The rows 'b d' of all processes, '(count b) d', in the order of the batch; gradients flow back to each."""
        return x if self.count == 1 else torch.cat(all_gather(x.contiguous()))


ALONE = Processes()


@contextmanager
def processes(device: str | torch.device = "cpu") -> Iterator[Processes]:
    """The group that torchrun started this process in; alone outside torchrun."""
    device = torch.device(device)
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield Processes(device=device)
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    # long: the first process alone draws sheets and class pictures, and the others wait
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(days=7))
    try:
        yield Processes(dist.get_rank(), dist.get_world_size(), device)
    finally:
        dist.destroy_process_group()
