"""Multi-head attention with its four projections: the layer that LoRA, token maps and IP-Adapter wrap."""

from __future__ import annotations

from einops import rearrange
from torch import Tensor, nn

from minisd.runtime.kernels import attention


class Attention(nn.Module):
    """Queries from x, keys and values from context (from x itself when there is none).

    width: of x and of the result. context_width: of the context, `width` when None. heads divides width. qkv_bias: CLIP
    has biases on its projections, the U-Net has not. impl: which form of `minisd.attention` runs.
    """

    def __init__(self, width: int, context_width: int | None = None, *, heads: int, qkv_bias: bool = False):
        super().__init__()
        context_width = width if context_width is None else context_width
        self.heads = heads
        self.impl = "auto"
        self.to_q = nn.Linear(width, width, bias=qkv_bias)
        self.to_k = nn.Linear(context_width, width, bias=qkv_bias)
        self.to_v = nn.Linear(context_width, width, bias=qkv_bias)
        self.to_out = nn.Linear(width, width)

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        kv: tuple[Tensor, Tensor] | None = None,
        causal: bool = False,
    ) -> Tensor:
        """x 'b n d', context 'b m c' or kv = keys_values(context) computed earlier → 'b n d'."""
        k, v = self.keys_values(x if context is None else context) if kv is None else kv
        q = rearrange(self.to_q(x), "b n (i d) -> b n i d", i=self.heads)
        out = attention(q, k, v, causal=causal, impl=self.impl)
        return self.to_out(rearrange(out, "b n i d -> b n (i d)"))

    def keys_values(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """The keys and values 'b m i d' of a context 'b m c'."""
        k, v = self.to_k(context), self.to_v(context)
        return rearrange(k, "b m (i d) -> b m i d", i=self.heads), rearrange(v, "b m (i d) -> b m i d", i=self.heads)
