"""softmax(q kᵀ · scale) v, once for reading and once for speed; one test holds them equal."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor


def attention(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, scale: float | None = None, impl: str = "auto"
) -> Tensor:
    """Scaled dot-product attention (Vaswani et al. 2017, eq. 1), i heads at a time.

    q: 'b n i d'; k, v: 'b m i d', all of one floating dtype, which is the result's too. Returns 'b n i d'. Scores and
    softmax are accumulated in float32 at least. scale: d^-0.5 when None. causal: query j sees the keys 0..j.
    impl: "auto" or a name in IMPLEMENTATIONS. ValueError for an unknown impl or shapes that do not fit.
    """
    if q.ndim != 4 or k.shape != v.shape or q.shape[0] != k.shape[0] or q.shape[2:] != k.shape[2:]:
        raise ValueError(
            f"attention takes q 'b n i d' and k, v 'b m i d' (i heads of width d), "
            f"got {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )
    if impl == "auto":
        impl = "sdpa"
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"unknown attention impl {impl!r}; known: auto, {', '.join(IMPLEMENTATIONS)}")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return IMPLEMENTATIONS[impl](q, k, v, causal, scale)


def _naive(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> Tensor:
    """The formula as the paper writes it: the form to read, and the reference of the tests."""
    accumulate = torch.promote_types(q.dtype, torch.float32)
    scores = torch.einsum("b n i d, b m i d -> b i n m", q.to(accumulate) * scale, k.to(accumulate))
    if causal:
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(future, float("-inf"))
    return torch.einsum("b i n m, b m i d -> b n i d", scores.softmax(-1), v.to(accumulate)).to(q.dtype)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> Tensor:
    """PyTorch's fused attention; heads move in front of tokens as views, without a copy."""
    q, k, v = (rearrange(x, "b n i d -> b i n d") for x in (q, k, v))
    return rearrange(F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale), "b i n d -> b n i d")


IMPLEMENTATIONS = {"naive": _naive, "sdpa": _sdpa}
