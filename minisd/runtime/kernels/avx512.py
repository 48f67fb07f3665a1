"""Attention by attention_avx512.cpp, compiled at first use by the machine's own C++ compiler and cached."""

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

import torch
from torch import Tensor

from minisd.runtime.modes import needs_gradient

SOURCE = Path(__file__).with_name("attention_avx512.cpp")
LANES, QUERIES = 16, 48  # of attention_avx512.cpp
WIDEST = 160  # of the heads: Stable Diffusion's widest
# OpenMP, because its threads are those of PyTorch; others would compete with them
FLAGS = ["-O3", "-std=c++17", "-fPIC", "-shared", "-fopenmp", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]


class Strides(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("image", "token", "head")]


class Problem(ctypes.Structure):
    """attention_avx512.cpp's struct of this name."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("q", "k", "v", "out")),
        *((f"{name}_strides", Strides) for name in ("q", "k", "v", "out")),
        *((name, ctypes.c_int64) for name in ("images", "queries", "keys", "heads", "width", "parts")),
        ("threads", ctypes.c_int),
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
    if needs_gradient(q, k, v):
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
    if torch.backends.cpu.get_cpu_capability() != "AVX512":  # its f, bw, dq and vl
        return "needs a CPU with AVX-512"
    if dtype == torch.bfloat16 and not cpu_has("avx512_bf16"):
        return "needs a CPU with AVX-512-BF16"
    if compiler() is None:
        return "needs Linux and a C++ compiler: install g++, or name another in CXX"
    return None


def cpu_has(feature: str) -> bool:
    """Whether PyTorch sees an instruction set; False where it cannot tell."""
    return getattr(torch.cpu, f"_is_{feature}_supported", lambda: False)()


# ----------------------------------------------------------------------------------------------------------- operator


def _run(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    if q.shape[::2] != k.shape[::2] or q.shape[3] != k.shape[3] or k.shape != v.shape:
        raise ValueError(f"attention_avx512: {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)} do not fit")
    if reason := why_not_avx512(q, k, v, False, scale):
        raise ValueError(f"attention_avx512 {reason}")
    function = kernel(q.dtype, q.shape[-1])
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    out = _empty_result(q, k, v, scale)
    (images, queries, heads, width), keys, threads = q.shape, k.shape[1], torch.get_num_threads()
    # a few tasks per thread, so that all finish at about the same time
    parts = min(-(-4 * threads // (images * heads)), -(-queries // QUERIES))
    pointers = (x.data_ptr() for x in (q, k, v, out))
    strides = (Strides(*x.stride()[:3]) for x in (q, k, v, out))
    problem = Problem(*pointers, *strides, images, queries, keys, heads, width, parts, threads, scale)
    if function(ctypes.byref(problem)):
        raise MemoryError("attention: there is no memory left for the keys and values of a head")
    return out


def _empty_result(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    return q.new_empty(q.shape)


_LIBRARY = torch.library.Library("minisd", "FRAGMENT")  # an operator, so that whoever watches PyTorch's sees it
_LIBRARY.define("attention_avx512(Tensor q, Tensor k, Tensor v, float scale) -> Tensor")
_LIBRARY.impl("attention_avx512", _run, "CPU")
torch.library.register_fake("minisd::attention_avx512", _empty_result, lib=_LIBRARY)


# -------------------------------------------------------------------------------------------------------- compilation


@functools.cache
def can_compile(dtype: torch.dtype, width: int) -> bool:
    """Whether the kernel compiles and loads; the first failure is a RuntimeWarning."""
    try:
        kernel(dtype, width)
    except (RuntimeError, OSError) as error:
        warnings.warn(
            f"PyTorch's own attention answers, for minisd's has failed: {error}", RuntimeWarning, stacklevel=2
        )
        return False
    return True


@functools.cache
def kernel(dtype: torch.dtype, width: int) -> Callable:
    """The compiled function of a dtype and head width. OSError or RuntimeError where compiling or loading fails.

    By hand and not by torch.utils.cpp_extension, which takes as long, but needs ninja and setuptools at run time, warns
    of a missing CUDA runtime, and fails for good on a damaged file of its cache (BENCHMARKS.md).
    """
    macros = ["-mavx512bf16", "-DBFLOAT16=1"] if dtype == torch.bfloat16 else ["-DBFLOAT16=0"]
    options = [*FLAGS, *macros, f"-DCOLUMNS={-(-width // LANES)}"]
    digest = hashlib.sha256(SOURCE.read_bytes() + " ".join([compiler(), *options]).encode()).hexdigest()
    folder = _cache()
    cached = folder and folder / f"attention-{digest[:16]}.so"
    if cached and cached.exists():
        with suppress(OSError):  # a damaged one is compiled again
            return _loaded(cached)
    with tempfile.TemporaryDirectory(prefix="minisd-") as temporary:
        library = Path(temporary, "attention.so")
        process = subprocess.run([compiler(), *options, str(SOURCE), "-o", str(library)], capture_output=True)
        if process.returncode:
            message = process.stderr.decode(errors="replace").strip()
            raise RuntimeError(f"{compiler()} cannot compile {SOURCE.name}: {message[:2000]}")
        if cached:
            with suppress(OSError):  # atomically, for other processes that compile it now
                os.replace(shutil.copy(library, f"{cached}.{os.getpid()}"), cached)
        return _loaded(library)


def _loaded(path: Path) -> Callable:
    function = ctypes.CDLL(str(path)).attention
    function.argtypes, function.restype = [ctypes.POINTER(Problem)], ctypes.c_int
    return function


def _cache() -> Path | None:
    """This user's cache folder; None where it cannot be made, or belongs to another user."""
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "minisd")
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        return folder if folder.stat().st_uid == os.getuid() else None
    except (OSError, RuntimeError):  # RuntimeError: a user without a home
        return None


@functools.cache
def compiler() -> str | None:
    """Path of a C++ compiler with OpenMP: $CXX, else g++; None where there is none."""
    return shutil.which(os.environ.get("CXX") or "g++") if sys.platform == "linux" else None
