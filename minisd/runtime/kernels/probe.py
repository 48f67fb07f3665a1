"""Looking inside attention without turning its quick form off: the weights, made again from the log-sum-exp.

The fused form never writes the n · m weights out, but it returns the logarithm of each row's sum, and with that any
part of the weights is one product away:

    out, lse = attention_with_lse(q, k, v)
    weights = weights_from_lse(q[:, :64], k, lse[..., :64])    # of the first 64 queries only
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from minisd.runtime.kernels.attention import attention, check_shapes
from minisd.runtime.kernels.choice import choose
from minisd.runtime.kernels.fused import fused_attention


def attention_with_lse(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, impl: str = "auto"
) -> tuple[Tensor, Tensor]:
    """attention(q, k, v), and lse 'b i n': the natural logarithm of each query's sum of exponentials, float32 or wider.

    The fused form has it at hand; beside any other it is computed, 256 queries at a time. No gradient flows into lse.
    """
    check_shapes(q, k, v)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    impl = choose(q, k, v, False, scale) if impl == "auto" else impl
    if impl in ("fused", "hopper"):
        out, lse = fused_attention(q, k, v, False, scale, hopper=impl == "hopper")
        return out, lse * math.log(2)
    with torch.no_grad():
        lse = torch.cat([_scores(part, k, scale).logsumexp(-1) for part in q.split(256, dim=1)], dim=-1)
    return attention(q, k, v, scale=scale, impl=impl), lse


def weights_from_lse(q: Tensor, k: Tensor, lse: Tensor, *, scale: float | None = None) -> Tensor:
    """softmax(q kᵀ · scale) 'b i n m' in float32 or wider, of the queries given and with their own part of lse."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return (_scores(q, k, scale) - lse[..., None]).exp()


def _scores(q: Tensor, k: Tensor, scale: float) -> Tensor:
    dtype = torch.promote_types(q.dtype, torch.float32)
    return torch.einsum("b n i d, b m i d -> b i n m", q.to(dtype), k.to(dtype)) * scale
