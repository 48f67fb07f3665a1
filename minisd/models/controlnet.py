"""ControlNet (Zhang et al. 2023): a trainable copy of the encoder that steers a frozen U-Net through its skips.

It is also the worked example of how to add a conditioning: all that the U-Net knows of it is `cond.residuals`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from minisd.config import ControlNetConfig
from minisd.models.unet import (
    Conditioning,
    Slot,
    UNet,
    check_inputs,
    embed_time,
    embedding_mlp,
    label_embedding,
    zero_residual_branches,
)


class ControlNet(nn.Module):
    """Residuals for a U-Net's skips and middle, from x_t, t, the conditioning and a hint (edges, depth, a pose)."""

    def __init__(self, config: ControlNetConfig):
        super().__init__()
        self.control_config = config
        self.config = unet = config.unet
        plan = unet.plan()
        self.time_embed = embedding_mlp(unet.channels, unet.embedding_dim)
        self.label_emb = label_embedding(unet)
        self.conv_in = nn.Conv2d(unet.in_channels, unet.channels, 3, padding=1)
        self.hint = HintEncoder(config.hint_channels, config.hint_widths, unet.channels)
        self.down = nn.ModuleList(Slot(slot, unet) for slot in plan.down)
        self.mid = nn.ModuleList(Slot(slot, unet) for slot in plan.mid)
        self.zero_convs = nn.ModuleList(nn.Conv2d(width, width, 1) for width in plan.skip_channels)
        self.zero_conv_mid = nn.Conv2d(plan.mid[-1].out_channels, plan.mid[-1].out_channels, 1)
        zero_residual_branches(self)
        for conv in (*self.zero_convs, self.zero_conv_mid, self.hint.convs[-1]):
            nn.init.zeros_(conv.weight)
            nn.init.zeros_(conv.bias)

    def forward(self, x_t: Tensor, t: Tensor | float, cond: Conditioning, hint: Tensor) -> tuple[Tensor, ...]:
        """hint: RGB in [0, 1], 'b 3 8h 8w' for x_t 'b 4 h w'. Returns one residual per skip, then the middle's."""
        check_inputs(self.config, x_t, cond)
        factor = 2 ** (len(self.control_config.hint_widths) - 1)
        size = (factor * x_t.shape[-2], factor * x_t.shape[-1])
        if hint.shape[-2:] != size:
            raise ValueError(f"the hint is {tuple(hint.shape[-2:])} pixels; for these latents it must be {size}")
        emb = embed_time(self, t, cond, x_t)
        x = self.conv_in(x_t) + self.hint(hint)
        residuals = [self.zero_convs[0](x)]
        for slot, zero_conv in zip(self.down, self.zero_convs[1:], strict=True):
            x = slot(x, emb, cond.context)
            residuals.append(zero_conv(x))
        for slot in self.mid:
            x = slot(x, emb, cond.context)
        return (*residuals, self.zero_conv_mid(x))

    def copy_encoder(self, unet: UNet) -> None:
        """Start from a U-Net's encoder and middle, as training does; the hint and the zero convolutions stay."""
        own = self.state_dict()
        self.load_state_dict({name: value for name, value in unet.state_dict().items() if name in own}, strict=False)


def controlled(
    network: Callable[[Tensor, Tensor, Conditioning], Tensor],
    control: ControlNet,
    hint: Tensor,
    *,
    scale: float = 1.0,
    decay: float = 1.0,
) -> Callable[[Tensor, Tensor, Conditioning], Tensor]:
    """network(x_t, t, cond) with the control's residuals added to what cond already carries.

    The residual i of n is scaled by scale · decay^(n-1-i): decay=0.825 is the original's "guess mode". hint 'b 3 H W'
    is repeated where guidance batches the conditioned and the unconditioned pass.
    """

    def forward(x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        hints = hint.repeat(x_t.shape[0] // hint.shape[0], 1, 1, 1)
        residuals = control(x_t, t, cond, hints)
        residuals = tuple(r * (scale * decay ** (len(residuals) - 1 - i)) for i, r in enumerate(residuals))
        if cond.residuals is not None:
            residuals = tuple(a + b for a, b in zip(cond.residuals, residuals, strict=True))
        return network(x_t, t, replace(cond, residuals=residuals))

    return forward


class HintEncoder(nn.Module):
    """The hint brought to the latents' size and the U-Net's width: a plain and a strided convolution per width."""

    def __init__(self, channels: int, widths: tuple[int, ...], out_channels: int):
        super().__init__()
        convs = [nn.Conv2d(channels, widths[0], 3, padding=1)]
        for width, wider in pairwise(widths):
            convs += [nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, wider, 3, padding=1, stride=2)]
        self.convs = nn.ModuleList([*convs, nn.Conv2d(widths[-1], out_channels, 3, padding=1)])

    def forward(self, hint: Tensor) -> Tensor:
        for conv in self.convs[:-1]:
            hint = F.silu(conv(hint))
        return self.convs[-1](hint)
