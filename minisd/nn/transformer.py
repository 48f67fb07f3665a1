"""The transformer between the U-Net's convolutions: how an image is conditioned on its prompt."""

from __future__ import annotations

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from minisd.nn.attention import Attention
from minisd.nn.blocks import layers


class SpatialTransformer(nn.Module):
    """Norm, pixels to tokens, blocks of self- and cross-attention, tokens to pixels, with a residual connection.

    The projections in and out act on every token alone. SD1 stores them as 1×1 convolutions, SD2 as linear layers
    (linear_projection): the same arithmetic on weights of another shape.
    """

    def __init__(
        self,
        width: int,
        *,
        heads: int,
        context_dim: int,
        depth: int = 1,
        self_attention: bool = True,
        linear_projection: bool = False,
        norm_groups: int = 32,
        norm_eps: float = 1e-6,
        layer_norm_eps: float = 1e-5,
    ):
        super().__init__()
        project = nn.Linear if linear_projection else PointwiseConv
        self.norm = nn.GroupNorm(norm_groups, width, norm_eps)
        self.proj_in = project(width, width)
        self.blocks = layers(
            TransformerBlock(width, heads, context_dim, self_attention, layer_norm_eps) for _ in range(depth)
        )
        self.proj_out = project(width, width)

    def forward(self, x: Tensor, context: Tensor | list[KeysValues]) -> Tensor:
        """x 'b c h w'; context 'b l d', or keys_values(context) computed earlier → 'b c h w'."""
        h, w = x.shape[-2:]
        tokens = self.proj_in(rearrange(self.norm(x), "b c h w -> b (h w) c"))
        for i, block in enumerate(self.blocks):
            tokens = block(tokens, context if isinstance(context, Tensor) else context[i])
        return x + rearrange(self.proj_out(tokens), "b (h w) c -> b c h w", h=h, w=w)

    def keys_values(self, context: Tensor) -> list[KeysValues]:
        """Everything that depends on the context alone, one entry per block: exact, and the same at every step."""
        return [block.keys_values(context) for block in self.blocks]


# What one block needs of a context: (k, v) of attn1 (None where it is self-attention) and of attn2.
KeysValues = tuple[tuple[Tensor, Tensor] | None, tuple[Tensor, Tensor]]


class TransformerBlock(nn.Module):
    """Pre-norm self-attention, cross-attention and feed-forward, each with a residual connection."""

    def __init__(self, width: int, heads: int, context_dim: int, self_attention: bool, norm_eps: float):
        super().__init__()
        self.self_attention = self_attention
        self.norm1 = nn.LayerNorm(width, norm_eps)
        self.attn1 = Attention(width, None if self_attention else context_dim, heads=heads)
        self.norm2 = nn.LayerNorm(width, norm_eps)
        self.attn2 = Attention(width, context_dim, heads=heads)
        self.norm3 = nn.LayerNorm(width, norm_eps)
        self.ff = FeedForward(width)

    def forward(self, x: Tensor, context: Tensor | KeysValues) -> Tensor:
        """x 'b n c'; context 'b l d', or keys_values(context) → 'b n c'."""
        kv1, kv2 = (None, None) if isinstance(context, Tensor) else context
        context = context if isinstance(context, Tensor) else None
        x = x + self.attn1(self.norm1(x), None if self.self_attention else context, kv=kv1)
        x = x + self.attn2(self.norm2(x), context, kv=kv2)
        return x + self.ff(self.norm3(x))

    def keys_values(self, context: Tensor) -> KeysValues:
        return None if self.self_attention else self.attn1.keys_values(context), self.attn2.keys_values(context)


class FeedForward(nn.Module):
    """GEGLU (Shazeer 2020): the first half of the projection is the value, the second, through GELU, its gate."""

    def __init__(self, width: int, *, mult: int = 4):
        super().__init__()
        self.proj_in = nn.Linear(width, 2 * mult * width)
        self.proj_out = nn.Linear(mult * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """'b n c' → 'b n c'."""
        value, gate = self.proj_in(x).chunk(2, dim=-1)
        return self.proj_out(value * F.gelu(gate))


class PointwiseConv(nn.Conv2d):
    """A 1×1 convolution applied to tokens 'b n c', where it is a linear layer whose weight has two more axes."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.flatten(1), self.bias)
