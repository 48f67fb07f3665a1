"""The convolutional blocks that the U-Net and the VAE share, and the timestep embedding."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Layer = TypeVar("Layer", bound=nn.Module)


class ResBlock(nn.Module):
    """norm-silu-conv twice, with a residual connection: x + conv2(silu(norm2(conv1(silu(norm1(x))) + emb))).

    embedding_dim: width of the timestep embedding that is added between the convolutions; None (the VAE) adds nothing.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        embedding_dim: int | None = None,
        *,
        norm_groups: int,
        norm_eps: float,
    ):
        super().__init__()
        self.norm1 = nn.GroupNorm(norm_groups, in_channels, norm_eps)
        self.conv1 = Conv3x3(in_channels, out_channels)
        self.emb = None if embedding_dim is None else nn.Linear(embedding_dim, out_channels)
        self.norm2 = nn.GroupNorm(norm_groups, out_channels, norm_eps)
        self.conv2 = Conv3x3(out_channels, out_channels)
        self.skip = nn.Identity() if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, emb: Tensor | None = None) -> Tensor:
        """x 'b c h w', emb 'b e' → 'b c h w'. A hook that keeps the output of a norm or convolution sees it change."""
        # in place, where nothing else reads what is overwritten: at large sizes a new tensor costs more than the sum
        h = self.conv1(F.silu(self.norm1(x), inplace=True))
        if self.emb is not None:
            h += self.emb(F.silu(emb))[:, :, None, None]  # type: ignore[arg-type]  # with self.emb, emb is given
        h = self.conv2(F.silu(self.norm2(h), inplace=True))
        return h.add_(self.skip(x))


class Conv3x3(nn.Conv2d):
    """A 3×3 convolution of stride 1 and padding 1."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__(in_channels, out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.convolve(x, padding=(1, 1))

    def convolve(self, x: Tensor, padding: tuple[int, int]) -> Tensor:
        """With other padding (above and below, left and right): VAE tiling brings a tile's neighbouring rows along."""
        return F.conv2d(x, self.weight, self.bias, padding=padding)


class Downsample(nn.Module):
    """A convolution of stride 2. The U-Net pads all round, the VAE only right and below (symmetric=False)."""

    def __init__(self, channels: int, *, symmetric: bool = True):
        super().__init__()
        self.symmetric = symmetric
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1 if symmetric else 0)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x if self.symmetric else F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Nearest neighbour, then a convolution. forward's size: the side lengths to reach; None doubles them."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = Conv3x3(channels, channels)

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        # "nearest" repeats every pixel exactly; where a side of `size` is odd the last one comes once
        size = (2 * x.shape[-2], 2 * x.shape[-1]) if size is None else size
        return self.conv(F.interpolate(x, size=size, mode="nearest"))


def layers(modules: Iterable[Layer]) -> list[Layer]:
    """An nn.ModuleList, which to a type checker is a list: of its own it does not say what it holds."""
    return nn.ModuleList(modules)  # type: ignore[return-value]  # see above


def timestep_embedding(t: Tensor, width: int, *, max_period: float = 10000.0) -> Tensor:
    """Sinusoids of t, cosines first, then sines: cos(t·p^(-i/half)), i < half = width/2 (Ho et al. 2020, appendix B).

    t: 'b', integer or real. Returns 'b width' in float32 (float64 for float64 t).
    """
    t = t if t.dtype == torch.float64 else t.float()
    half = width // 2
    frequencies = torch.exp(-math.log(max_period) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
    angles = t[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)
