"""softmax(q kᵀ · scale) v, written out and in PyTorch's fused form, and the layer that the networks are built with."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


def naive_attention(q: Tensor, k: Tensor, v: Tensor, causal: bool = False, scale: float | None = None) -> Tensor:
    """Scaled dot-product attention (Vaswani et al. 2017, eq. 1), the form to read: the axis i holds the heads.

    q: 'b n i d'; k, v: 'b m i d', all of one floating dtype, which is the result's too. Returns 'b n i d'. Scores and
    softmax are accumulated in float32 at least. scale: d^-0.5 when None. causal: query n sees the keys 0..n.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    accumulate = torch.promote_types(q.dtype, torch.float32)
    scores = torch.einsum("b n i d, b m i d -> b i n m", q.to(accumulate) * scale, k.to(accumulate))
    if causal:
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(future, float("-inf"))
    return torch.einsum("b i n m, b m i d -> b n i d", scores.softmax(-1), v.to(accumulate)).to(q.dtype)


def sdpa_attention(q: Tensor, k: Tensor, v: Tensor, causal: bool = False, scale: float | None = None) -> Tensor:
    """The same by PyTorch's fused attention; heads move in front of tokens as views, without a copy."""
    # on rows that are not contiguous PyTorch silently writes all n² scores out, which is far slower
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    q, k, v = (rearrange(x, "b n i d -> b i n d") for x in (q, k, v))
    return rearrange(F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale), "b i n d -> b n i d")


class Attention(nn.Module):
    """Multi-head attention: queries from x, keys and values from context (from x itself when there is none).

    width: of x and of the result. context_width: of the context, `width` when None. heads divides width. qkv_bias: CLIP
    has biases on its projections, the U-Net has not. `attend` is the form that runs: `sdpa_attention`, unless an
    experiment or `runtime.optimize` puts another there. LoRA, cross-attention maps and IP-Adapter wrap this layer.
    """

    attend = staticmethod(sdpa_attention)

    def __init__(self, width: int, context_width: int | None = None, *, heads: int, qkv_bias: bool = False):
        super().__init__()
        context_width = width if context_width is None else context_width
        self.heads = heads
        self.to_q = nn.Linear(width, width, bias=qkv_bias)
        self.to_k = nn.Linear(context_width, width, bias=qkv_bias)
        self.to_v = nn.Linear(context_width, width, bias=qkv_bias)
        self.to_out = nn.Linear(width, width)

    def forward(
        self, x: Tensor, context: Tensor | None = None, *, kv: tuple[Tensor, Tensor] | None = None, causal: bool = False
    ) -> Tensor:
        """x 'b n d', context 'b m c' or kv = keys_values(context) computed earlier → 'b n d'."""
        k, v = self.keys_values(x if context is None else context) if kv is None else kv
        q = rearrange(self.to_q(x), "b n (i d) -> b n i d", i=self.heads)
        return self.to_out(rearrange(self.attend(q, k, v, causal), "b n i d -> b n (i d)"))

    def keys_values(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """The keys and values 'b m i d' of a context 'b m c'."""
        k, v = self.to_k(context), self.to_v(context)
        return rearrange(k, "b m (i d) -> b m i d", i=self.heads), rearrange(v, "b m (i d) -> b m i d", i=self.heads)
