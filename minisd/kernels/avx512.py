"""Attention by attention_avx512.cpp, compiled at first use by the machine's own C++ compiler and kept for later."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import math
import os
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from threading import Thread

import torch
from torch import Tensor

SOURCE = Path(__file__).with_name("attention_avx512.cpp")
LANES = 16  # float32 in a register
WIDEST = 160  # of the heads: Stable Diffusion's widest
FLAGS = ["-O3", "-std=c++17", "-fPIC", "-shared", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]


class Strides(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("image", "token", "head")]


class Problem(ctypes.Structure):
    """What attention_avx512.cpp calls by the same names."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("q", "k", "v", "out")),
        *((f"{name}_strides", Strides) for name in ("q", "k", "v", "out")),
        *((name, ctypes.c_int64) for name in ("images", "queries", "keys", "heads", "width", "parts", "next")),
        ("scale", ctypes.c_float),
    ]


def avx512_attention(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> Tensor:
    """softmax(q kᵀ · scale) v 'b n i d', by as many threads as PyTorch takes.

    ValueError where `why_not_avx512` says why; RuntimeError with the compiler's own words where it refuses.
    """
    if reason := why_not_avx512(q, k, v, causal, scale):
        raise ValueError(f"impl='avx512' {reason}: use impl='sdpa', or 'auto', which picks what can run")
    return torch.ops.minisd.attention_avx512(q, k, v, scale)


def why_not_avx512(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> str | None:
    """Why the kernel cannot take this, as the rest of a sentence, or None where it can."""
    if any(x.device.type != "cpu" for x in (q, k, v)):
        return f"runs on CPUs, and the tensors are on {q.device}"
    if causal:
        return "has no causal form"
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        return "has no gradient; torch.no_grad() would allow it"
    if q.dtype not in (torch.float32, torch.bfloat16) or not q.dtype == k.dtype == v.dtype:
        return f"takes float32 or bfloat16, one for all, got {q.dtype}, {k.dtype}, {v.dtype}"
    if q.shape[-1] > WIDEST or q.shape[-1] % 2:
        return f"takes heads of even widths up to {WIDEST}, got {q.shape[-1]}"
    if not all((*q.shape, *k.shape)):
        return f"takes at least one token, got {tuple(q.shape)} and {tuple(k.shape)}"
    if not 0 < scale < math.inf:
        return f"takes a positive scale, got {scale}"
    return _wrong_machine(q.dtype)


def _wrong_machine(dtype: torch.dtype) -> str | None:
    needed = ["avx512", "avx512_bf16"] if dtype == torch.bfloat16 else ["avx512"]
    if missing := [name for name in needed if not cpu_has(name)]:
        return f"needs a CPU with {missing[0].upper().replace('_', '-')}"
    if compiler() is None:
        return "needs Linux and a C++ compiler: install g++ or clang, or name one in CXX"
    return None


def cpu_has(feature: str) -> bool:
    """Whether PyTorch sees an instruction set; False where it cannot tell."""
    return getattr(torch.cpu, f"_is_{feature}_supported", lambda: False)()


# ----------------------------------------------------------------------------------------------------------- operator


def _run(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    function = kernel(q.dtype, q.shape[-1])
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    out = _shape(q, k, v, scale)
    (images, queries, heads, width), keys, threads = q.shape, k.shape[1], torch.get_num_threads()
    # a few tasks for each thread, so that all end at about the same time; keys are packed anew for every task
    parts = max(1, 4 * threads // (images * heads))
    tensors = (q, k, v, out)
    strides = (Strides(*x.stride()[:3]) for x in tensors)
    pointers = (x.data_ptr() for x in tensors)
    problem = Problem(*pointers, *strides, images, queries, keys, heads, width, parts, 0, scale)
    helpers = [Thread(target=function, args=(ctypes.byref(problem),)) for _ in range(threads - 1)]
    for helper in helpers:
        helper.start()
    function(ctypes.byref(problem))
    for helper in helpers:
        helper.join()
    return out


def _shape(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    return q.new_empty(q.shape)


_LIBRARY = torch.library.Library("minisd", "FRAGMENT")  # an operator, so that whoever watches PyTorch's sees it
_LIBRARY.define("attention_avx512(Tensor q, Tensor k, Tensor v, float scale) -> Tensor")
_LIBRARY.impl("attention_avx512", _run, "CPU")
torch.library.register_fake("minisd::attention_avx512", _shape, lib=_LIBRARY)


# -------------------------------------------------------------------------------------------------------- compilation


def can_compile(dtype: torch.dtype, width: int) -> bool:
    """Whether the kernel is there; the first failure is told by a RuntimeWarning."""
    return _compiled_or_warned(dtype, -(-width // LANES))


@functools.cache
def _compiled_or_warned(dtype: torch.dtype, columns: int) -> bool:
    try:
        kernel(dtype, columns * LANES)
    except (RuntimeError, OSError) as error:
        warnings.warn(
            f"PyTorch's own attention answers, for minisd's has failed: {error}", RuntimeWarning, stacklevel=2
        )
        return False
    return True


def kernel(dtype: torch.dtype, width: int) -> Callable:
    """The compiled function of a dtype and head width. OSError or RuntimeError where that cannot be had."""
    return _kernel(dtype == torch.bfloat16, -(-width // LANES))


@functools.cache
def _kernel(bfloat16: bool, columns: int) -> Callable:
    own = ["-mavx512bf16"] if bfloat16 else []
    options = [*FLAGS, *own, f"-DBFLOAT16={int(bfloat16)}", f"-DCOLUMNS={columns}"]
    name = hashlib.sha256("\n".join([SOURCE.read_text(), compiler() or "", *options]).encode()).hexdigest()[:16]
    with suppress(OSError):  # no home, or one that cannot be written to: compiled for this process alone
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "minisd")
        folder.mkdir(parents=True, exist_ok=True)
        kept = folder / f"attention-{name}.so"
        if not kept.exists():
            with tempfile.TemporaryDirectory(dir=folder) as place:
                os.replace(_compile(options, Path(place)), kept)
        return _loaded(kept)
    with tempfile.TemporaryDirectory() as place:
        return _loaded(_compile(options, Path(place)))


def _compile(options: list[str], folder: Path) -> Path:
    path = folder / "attention.so"
    done = subprocess.run([compiler(), *options, str(SOURCE), "-o", str(path)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{compiler()} cannot compile {SOURCE.name}: {done.stderr.strip()[:2000]}")
    return path


def _loaded(path: Path) -> Callable:
    function = ctypes.CDLL(str(path)).attention
    function.argtypes, function.restype = [ctypes.POINTER(Problem)], None
    return function


@functools.cache
def compiler() -> str | None:
    """The C++ compiler's path: what CXX names, else g++ or clang++; None where there is none that is known to work."""
    names = [os.environ.get("CXX"), "g++", "clang++"]
    return (
        next((path for name in names if name and (path := shutil.which(name))), None)
        if sys.platform == "linux"
        else None
    )
