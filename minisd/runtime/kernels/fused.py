"""Attention by this package's own CUDA kernels, as PyTorch operators with autograd and torch.compile.

`minisd::attention_forward(q, k, v, scale, hopper) -> (o, lse)` and
`minisd::attention_backward(dout, q, k, v, o, lse, scale) -> (dq, dk, dv)`; lse 'b i n' is the log2 of the sum of
2^(score · log2 e). Both are deterministic. At the first use of a head width and dtype on a GPU they are compared
with a plain version in PyTorch; where they differ or do not compile, a RuntimeWarning says so, and the plain one runs
from then on.
"""

from __future__ import annotations

import functools
import math
import warnings

import torch
from torch import Tensor

from minisd.runtime.kernels.hopper import cuda_hopper_launch, hopper_launch
from minisd.runtime.kernels.launch import (
    C_NAME,
    TILES,
    Launcher,
    Params,
    backward_launches,
    cuda_launch,
    forward_launch,
)

# Relative L2 error that rounding alone explains, with a margin: the results are rounded once, and the probabilities
# and their gradients once more before the second product.
TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
KERNELS = {"forward": cuda_launch, "hopper": cuda_hopper_launch, "backward": cuda_launch}


def fused_attention(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float, *, hopper: bool = False
) -> tuple[Tensor, Tensor]:
    """softmax(q kᵀ · scale) v 'b n i d' and its lse 'b i n'. ValueError says why where `why_not_fused` does.

    hopper: the forward of attention_sm90.cu, which only GPUs of compute capability 9.0 run; its gradients are the same.
    """
    if reason := why_not_fused(q, k, v, causal, scale, hopper=hopper):
        name = "hopper" if hopper else "fused"
        raise ValueError(f"impl={name!r} {reason}: use impl='sdpa', or 'auto', which picks what can run")
    return torch.ops.minisd.attention_forward(q, k, v, scale, hopper)


def why_not_fused(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float, *, hopper: bool = False) -> str | None:
    """Why the kernels cannot take this, as the rest of a sentence, or None where they can."""
    if q.device.type != "cuda" or torch.version.cuda is None:
        return f"runs on CUDA GPUs, and the tensors are on {q.device}"
    if not q.device == k.device == v.device:
        return f"takes tensors of one device, got {q.device}, {k.device}, {v.device}"
    if causal:
        return "has no causal form"
    if q.dtype not in C_NAME or not q.dtype == k.dtype == v.dtype:
        return f"takes float16 or bfloat16, one for all, got {q.dtype}, {k.dtype}, {v.dtype}"
    if q.shape[-1] not in TILES:
        return f"knows head widths {', '.join(map(str, TILES))}, got {q.shape[-1]}"
    if not all((*q.shape, *k.shape)) or max(q.shape[0], q.shape[2]) > 65535:
        return f"takes 1 to 65535 images and heads and at least one token, got {tuple(q.shape)} and {tuple(k.shape)}"
    if not 0 < scale < math.inf:
        return f"takes a positive scale, got {scale}"
    return _wrong_gpu(q.device.index or 0, hopper)


def _wrong_gpu(device: int, hopper: bool) -> str | None:
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) == (9, 0) if hopper else major >= 8:
        return None
    needed = "9.0 (Hopper)" if hopper else "8.0 (Ampere) or newer"
    return f"needs compute capability {needed}, and {torch.cuda.get_device_name(device)} has {major}.{minor}"


# For torch.compile, which cannot trace into the driver. torch.compiler.assume_constant_result would set this too, but
# imports the whole compiler.
_wrong_gpu._dynamo_marked_constant = True


def forward(
    q: Tensor, k: Tensor, v: Tensor, scale: float, hopper: bool = False, *, launcher: Launcher
) -> tuple[Tensor, Tensor]:
    """The forward operator by a launcher: the GPU's, or the one with which the tests run the kernels on a CPU."""
    q, k, v = map(_readable, (q, k, v))
    o, lse = _forward_shapes(q, k, v, scale, hopper)
    launcher((hopper_launch if hopper else forward_launch)(q, k), Params.of(scale, lse, q=q, k=k, v=v, o=o))
    return o, lse


def backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, scale: float, *, launcher: Launcher
) -> tuple[Tensor, Tensor, Tensor]:
    """The backward operator, likewise: two launches, dQ and then dK with dV (7 matrix products, no atomics)."""
    dout, q, k, v, o = map(_readable, (dout, q, k, v, o))
    dq, dk, dv = _backward_shapes(dout, q, k, v, o, lse, scale)
    lse, delta = lse.contiguous(), torch.empty_like(lse, memory_format=torch.contiguous_format)
    params = Params.of(scale, lse, delta, q=q, k=k, v=v, o=o, dout=dout, dq=dq, dk=dk, dv=dv)
    for launch in backward_launches(q, k):
        launcher(launch, params)
    return dq, dk, dv


def _readable(x: Tensor) -> Tensor:
    """x itself where its rows are contiguous and start at multiples of 16 bytes, as the copies of the kernels want."""
    aligned = x.data_ptr() % 16 == 0 and all(s % 8 == 0 for s in x.stride()[:3])
    return x if x.stride(-1) == 1 and aligned else x.clone(memory_format=torch.contiguous_format)


# ----------------------------------------------------------------------------------------------- the plain version


def plain_forward(q: Tensor, k: Tensor, v: Tensor, scale: float, hopper: bool = False) -> tuple[Tensor, Tensor]:
    """The forward operator in PyTorch, in float32 or wider: all n · m scores written out."""
    q, k, v, dtype = *(x.to(torch.promote_types(x.dtype, torch.float32)) for x in (q, k, v)), q.dtype
    s = torch.einsum("b n i d, b m i d -> b i n m", q, k) * scale
    lse = s.logsumexp(-1)
    o = torch.einsum("b i n m, b m i d -> b n i d", (s - lse[..., None]).exp(), v)
    return o.to(dtype).contiguous(), lse * math.log2(math.e)


def plain_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The backward operator in PyTorch, by the formulas that the kernels use."""
    wide = torch.promote_types(q.dtype, torch.float32)
    dout, q, k, v, o, dtype = *(x.to(wide) for x in (dout, q, k, v, o)), q.dtype
    p = torch.exp2(torch.einsum("b n i d, b m i d -> b i n m", q, k) * (scale * math.log2(math.e)) - lse[..., None])
    delta = torch.einsum("b n i d, b n i d -> b i n", dout, o)
    ds = p * (torch.einsum("b n i d, b m i d -> b i n m", dout, v) - delta[..., None]) * scale
    dq = torch.einsum("b i n m, b m i d -> b n i d", ds, k)
    dk = torch.einsum("b i n m, b n i d -> b m i d", ds, q)
    dv = torch.einsum("b i n m, b n i d -> b m i d", p, dout)
    return tuple(x.to(dtype).contiguous() for x in (dq, dk, dv))


@functools.cache
def trusted(device: int, width: int, dtype: torch.dtype, kernel: str) -> bool:
    """Whether this one of KERNELS runs on this GPU and agrees with the plain version; warns where not."""
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("attention's kernels are compiled and checked at their first use: run once before capturing")
    try:
        error = self_check(torch.device("cuda", device), width, dtype, kernel, KERNELS[kernel])
        failed = None if error < TOLERANCE[dtype] else f"differ from the plain version by {error:.1e}, relatively"
    except (RuntimeError, ImportError) as problem:  # no compiler, or one that refuses; no driver binding
        failed = f"cannot be run ({problem})"
    if failed:
        warnings.warn(
            f"minisd's attention kernels ({kernel}) for {C_NAME[dtype]}, width {width}, {failed} on "
            f"{torch.cuda.get_device_name(device)}: the plain version runs instead, which is slower",
            RuntimeWarning,
            stacklevel=2,
        )
    return failed is None


def self_check(device: torch.device, width: int, dtype: torch.dtype, kernel: str, launcher: Launcher) -> float:
    """The kernels' largest relative error against the plain version, on one tile of keys and on several."""
    generator, scale, worst = torch.Generator().manual_seed(0), width**-0.5, 0.0
    for n, m in ((50, 77), (80, 150)):
        q, k, v, dout = (
            torch.randn(1, tokens, 2, width, generator=generator).to(device, dtype) for tokens in (n, m, m, n)
        )
        o, lse = plain_forward(q, k, v, scale)
        if kernel == "backward":
            outputs = backward(dout, q, k, v, o, lse, scale, launcher=launcher)
            expected = plain_backward(dout, q, k, v, o, lse, scale)
        else:
            outputs, expected = forward(q, k, v, scale, kernel == "hopper", launcher=launcher), (o, lse)
        for x, y in zip(outputs, expected, strict=True):
            error = (torch.linalg.vector_norm(x.float() - y.float()) / torch.linalg.vector_norm(y.float())).item()
            worst = max(worst, error) if error == error else math.inf  # NaN is as wrong as can be
    return worst


# ---------------------------------------------------------------------------------------------------------- operators


def _forward_shapes(q, k, v, scale, hopper):
    b, n, i, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((b, i, n), dtype=torch.float32)


def _backward_shapes(dout, q, k, v, o, lse, scale):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _forward_on_gpu(q, k, v, scale, hopper):
    return _on_gpu("hopper" if hopper else "forward", forward, plain_forward, (q, k, v, scale, hopper))


def _backward_on_gpu(*arguments):
    return _on_gpu("backward", backward, plain_backward, arguments)


def _on_gpu(kernel: str, function, plain, arguments: tuple):
    x = arguments[0]
    with torch.cuda.device(x.device):
        if trusted(x.device.index, x.shape[-1], x.dtype, kernel):
            return function(*arguments, launcher=KERNELS[kernel])
        return plain(*arguments)


def _save(ctx, inputs, output):
    *tensors, ctx.scale, _ = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(output[1])


def _gradients(ctx, dout, _):
    return *torch.ops.minisd.attention_backward(dout, *ctx.saved_tensors, ctx.scale), None, None


_LIBRARY = torch.library.Library("minisd", "DEF")
_LIBRARY.define("attention_forward(Tensor q, Tensor k, Tensor v, float scale, bool hopper) -> (Tensor, Tensor)")
_LIBRARY.define(
    "attention_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, float scale) "
    "-> (Tensor, Tensor, Tensor)"
)
_LIBRARY.impl("attention_forward", _forward_on_gpu, "CUDA")
_LIBRARY.impl("attention_backward", _backward_on_gpu, "CUDA")
torch.library.register_fake("minisd::attention_forward", _forward_shapes, lib=_LIBRARY)
torch.library.register_fake("minisd::attention_backward", _backward_shapes, lib=_LIBRARY)
torch.library.register_autograd("minisd::attention_forward", _gradients, setup_context=_save, lib=_LIBRARY)
