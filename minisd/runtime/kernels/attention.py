"""softmax(q kᵀ · scale) v in every implementation, chosen by name or by measurement; a test holds them equal."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor

from minisd.nn.attention import naive_attention, sdpa_attention
from minisd.runtime.kernels.avx512 import avx512_attention
from minisd.runtime.kernels.choice import choose
from minisd.runtime.kernels.fused import fused_attention
from minisd.runtime.modes import needs_gradient


def attention(
    q: Tensor, k: Tensor, v: Tensor, causal: bool = False, scale: float | None = None, impl: str = "auto"
) -> Tensor:
    """Scaled dot-product attention (Vaswani et al. 2017, eq. 1), i heads at a time.

    q: 'b n i d'; k, v: 'b m i d', all of one floating dtype, which is the result's too. Returns 'b n i d'. Scores and
    softmax are accumulated in float32 at least. scale: d^-0.5 when None. causal: query j sees the keys 0..j.
    impl: "auto" or a name in IMPLEMENTATIONS; "fused", this package's CUDA kernels, and "hopper", with a forward for
    the H100 and H200, take fp16 and bf16 on a GPU, and no causal mask; "avx512", for CPUs, takes float32 and bf16, no
    causal mask, and has no gradient. "auto" is PyTorch's own, except where another was measured to be faster
    (choice.py). ValueError for an unknown impl, shapes that do not fit, and where these cannot run.
    """
    check_shapes(q, k, v)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if impl == "auto":
        impl = choose(q, k, v, causal, scale)
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"unknown attention impl {impl!r}; known: auto, {', '.join(IMPLEMENTATIONS)}")
    return IMPLEMENTATIONS[impl](q, k, v, causal, scale)


def check_shapes(q: Tensor, k: Tensor, v: Tensor) -> None:
    if q.ndim != 4 or k.shape != v.shape or q.shape[0] != k.shape[0] or q.shape[2:] != k.shape[2:]:
        raise ValueError(
            f"attention takes q 'b n i d' and k, v 'b m i d' (i heads of width d), "
            f"got {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )


def _matmul(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> Tensor:
    """Three operations: product, softmax, product. For heads too wide to fuse (the VAE's 512), where n² scores fit.

    On a GPU the products of half precision run on the tensor cores, with scores in float32.
    """
    b, _, heads, _ = q.shape
    q, k, v = (rearrange(x, "b n i d -> (b i) n d") for x in (q, k, v))
    if q.is_cuda and q.dtype.itemsize == 2 and torch.__version__ >= (2, 8) and not needs_gradient(q, k, v):
        scores = torch.bmm(q, k.mT, out_dtype=torch.float32).mul_(scale)
    else:
        accumulate = torch.promote_types(q.dtype, torch.float32)
        scores = (q.to(accumulate) * scale) @ k.to(accumulate).mT
    if causal:
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(future, float("-inf"))
    return rearrange(scores.softmax(-1).to(v.dtype) @ v, "(b i) n d -> b n i d", b=b, i=heads)


def _sdpa32(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> Tensor:
    """PyTorch's fused attention on copies in float32: on a CPU its backward in half precision is slow over few keys.

    Wider inputs stay as they are. Autocast, which would turn the copies back into half precision, is kept out.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    with torch.autocast(q.device.type, enabled=False):
        return sdpa_attention(q.to(wide), k.to(wide), v.to(wide), causal, scale).to(q.dtype)


def _fused(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> Tensor:
    """This package's CUDA kernels (attention.cu)."""
    return fused_attention(q, k, v, causal, scale)[0]


def _hopper(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> Tensor:
    """The same with the forward for Hopper GPUs (attention_sm90.cu)."""
    return fused_attention(q, k, v, causal, scale, hopper=True)[0]


IMPLEMENTATIONS = {
    "naive": naive_attention,
    "matmul": _matmul,
    "sdpa": sdpa_attention,
    "sdpa32": _sdpa32,
    "avx512": avx512_attention,
    "fused": _fused,
    "hopper": _hopper,
}
