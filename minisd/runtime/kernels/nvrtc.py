"""CUDA C++ to machine code at first use, by NVRTC: no compiler, toolkit, driver or GPU is needed to compile.

NVRTC and its Python binding come with torch's CUDA wheels from torch 2.10 on; for an older torch, install
`cuda-bindings` and `nvidia-cuda-nvrtc`.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from pathlib import Path

from minisd.runtime.kernels import ptx_sm90

HERE = Path(__file__).parent
ATTENTION = HERE / "attention.cu"


class CompilerMissing(RuntimeError):
    """There is no NVRTC to import; the message says what to install."""


@dataclass(frozen=True)
class Compiled:
    """One kernel's machine code, its symbol in there, and its registers per thread and spilled bytes, by ptxas."""

    cubin: bytes
    symbol: bytes
    registers: int
    spilled: int


@functools.cache
def compile_kernel(kernel: str, arch: str, source: Path = ATTENTION) -> Compiled:
    """One instance of a kernel template, named as in C++ ("backward_dq<Half, 40, 64, 4, 1>"), for "sm_80", "sm_90a" ….

    source: the file that has it; it may include any file of this folder.
    CompilerMissing without NVRTC; RuntimeError with the compiler's own words where it refuses.
    """
    nvrtc = _nvrtc()
    headers = _headers()
    texts, names = [text.encode() for text in headers.values()], [name.encode() for name in headers]
    program = _checked(
        nvrtc, nvrtc.nvrtcCreateProgram(source.read_bytes(), source.name.encode(), len(texts), texts, names)
    )
    try:
        _checked(nvrtc, nvrtc.nvrtcAddNameExpression(program, kernel.encode()))
        options = [f"--gpu-architecture={arch}".encode(), b"--std=c++17", b"--ptxas-options=-v"]
        failed = int(nvrtc.nvrtcCompileProgram(program, len(options), options)[0])
        log = b" " * _checked(nvrtc, nvrtc.nvrtcGetProgramLogSize(program))
        nvrtc.nvrtcGetProgramLog(program, log)
        log = log.decode(errors="replace").strip("\0 \n")
        if failed:
            version = ".".join(map(str, nvrtc.nvrtcVersion()[1:]))
            raise RuntimeError(f"NVRTC {version} cannot compile {kernel} for {arch}: {log[:2000]}")
        symbol = _checked(nvrtc, nvrtc.nvrtcGetLoweredName(program, kernel.encode()))
        cubin = b" " * _checked(nvrtc, nvrtc.nvrtcGetCUBINSize(program))
        _checked(nvrtc, nvrtc.nvrtcGetCUBIN(program, cubin))
    finally:
        nvrtc.nvrtcDestroyProgram(program)
    return Compiled(cubin, symbol, _number(r"Used (\d+) registers", log), _number(r"(\d+) bytes spill stores", log))


def arch_of(capability: tuple[int, int]) -> str:
    """The target's name for a compute capability; Hopper's own instructions ask for "sm_90a"."""
    return "sm_90a" if tuple(capability) == (9, 0) else f"sm_{capability[0]}{capability[1]}"


def _headers() -> dict[str, str]:
    files = sorted([*HERE.glob("*.cu"), *HERE.glob("*.cuh")])
    return {"device_sm90.cuh": ptx_sm90.text(), **{file.name: file.read_text() for file in files}}


def _nvrtc():
    try:
        from cuda.bindings import nvrtc

        nvrtc.nvrtcVersion()  # the binding loads its library at the first call
    except (ImportError, RuntimeError) as error:
        raise CompilerMissing(
            f"NVRTC cannot be loaded ({error}): pip install cuda-bindings nvidia-cuda-nvrtc, as new as torch's CUDA"
        ) from error
    return nvrtc


def _checked(nvrtc, result: tuple):
    if int(result[0]):
        raise RuntimeError(f"NVRTC: {nvrtc.nvrtcGetErrorString(result[0])[1].decode()}")
    return result[1] if len(result) == 2 else None


def _number(pattern: str, log: str) -> int:
    numbers = re.findall(pattern, log)
    if len(numbers) != 1:
        raise RuntimeError(f"the compiler's log does not say {pattern!r} once: {log[:500]}")
    return int(numbers[0])
