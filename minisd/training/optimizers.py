"""What moves the weights: AdamW alone, or Muon for matrices and kernels with AdamW for the rest."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from minisd.training.options import LoopConfig
from minisd.training.parallel import ALONE, Processes

QUINTIC = (3.4445, -4.7750, 2.0315)  # drives singular values from (0, 1] to about 1 (0.7 to 1.2) in five rounds


def build_optimizers(
    networks: nn.Module, config: LoopConfig, processes: Processes = ALONE
) -> list[torch.optim.Optimizer]:
    """AdamW (Loshchilov & Hutter 2019), which shrinks matrices and kernels only; with config.muon Muon for those.

    One of a kind for all networks, discriminators too: neither looks at more than one weight at a time, and each weight
    has the gradient of its own loss. A group's learning rate is that of the step times its "relative_lr". processes:
    all that train these networks, for whom gradients are averaged before a step.
    """
    tables = {id(m.weight) for m in networks.modules() if isinstance(m, nn.Embedding)}
    learnt = [p for p in networks.parameters() if p.requires_grad]
    matrices = [p for p in learnt if p.ndim > 1 and id(p) not in tables]
    others = [p for p in learnt if p.ndim <= 1 or id(p) in tables]
    shrunk = {"params": matrices, "weight_decay": config.weight_decay, "relative_lr": 1.0}
    plain = {"params": others, "weight_decay": 0.0, "relative_lr": 1.0}
    adamw = {"lr": config.lr, "betas": config.betas, "fused": True}
    if config.muon is None:
        return [torch.optim.AdamW([shrunk, plain], **adamw)]
    shrunk["relative_lr"] = config.muon / config.lr
    muon = Muon([shrunk], lr=config.muon, half=config.precision == "bfloat16", processes=processes)
    return [muon, *([torch.optim.AdamW([plain], **adamw)] if others else [])]


class Muon(torch.optim.Optimizer):
    """Momentum whose update has singular values of about 1 (Jordan et al. 2024, "Muon"), for matrices and kernels.

        m ← μ·m + (1-μ)·g,   u = μ·m + (1-μ)·g   (Nesterov),   w ← (1 - lr·decay)·w - lr·√max(1, rows/columns)·orth(u)

    A kernel 'o i h w' counts as the matrix 'o (i h w)'. Directions in which the gradient is weak move as far as the
    strong ones. It costs some products of small matrices per weight and step, whatever the batch.

    half: orthogonalise in bfloat16, which suffices where the hardware is quicker at it. processes: share that work; all
    must see the same gradients, and all get the same weights. A step holds the updates of all weights at once.
    """

    def __init__(
        self,
        params,
        lr: float,
        *,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        half: bool = False,
        processes: Processes = ALONE,
    ):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.dtype = torch.bfloat16 if half else torch.float32
        self.processes = processes

    @torch.no_grad()
    def step(self) -> None:
        moved = [(w, group) for group in self.param_groups for w in group["params"] if w.grad is not None]
        moved.sort(key=lambda pair: work(pair[0]), reverse=True)  # dealt out in turn, the shares are about equal
        updates = []
        for i, (weight, group) in enumerate(moved):
            state, mu = self.state[weight], group["momentum"]
            if not state:
                state["momentum"] = torch.zeros_like(weight)
            momentum = state["momentum"].lerp_(weight.grad, 1 - mu)
            if i % self.processes.count == self.processes.rank:
                updates.append(orthogonalized(weight.grad.lerp(momentum, mu).flatten(1).to(self.dtype)))
            else:
                updates.append(weight.new_zeros(len(weight), weight[0].numel(), dtype=self.dtype))
        self.processes.sum_(updates)
        for (weight, group), update in zip(moved, updates, strict=True):
            rows, columns = update.shape
            weight.mul_(1 - group["lr"] * group["weight_decay"])
            weight.add_(update.view(weight.shape), alpha=-group["lr"] * max(1, rows / columns) ** 0.5)


def work(weight: Tensor) -> int:
    """What orthogonalising it costs, to a factor."""
    return weight.numel() * min(len(weight), weight[0].numel())


def orthogonalized(matrix: Tensor) -> Tensor:
    """About U·Vᵀ of matrix = U·S·Vᵀ, 'r c': five rounds of Newton and Schulz's iteration with a quintic."""
    a, b, c = QUINTIC
    x = matrix / (matrix.norm() + 1e-7)
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    for _ in range(5):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if tall else x
