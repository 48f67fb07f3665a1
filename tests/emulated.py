"""The CUDA kernels' own text on the CPU: compiled by g++ against tests/cuda_shim, launched like on a GPU.

One library per head width and dtype, built when it is first asked for and kept in the temporary folder under the hash
of everything it is made of. Without g++ this raises: the kernels' proof is never skipped.
"""

import ctypes
import functools
import hashlib
import subprocess
import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import torch

from minisd.runtime.kernels import hopper
from minisd.runtime.kernels import launch as host
from minisd.runtime.kernels.launch import Launch, Params

SHIM = Path(__file__).parent / "cuda_shim"
KERNELS = Path(host.__file__).parent
COMMAND = ("g++", "-O1", "-std=c++17", "-march=x86-64-v3", "-w", "-shared", "-fPIC")
COUNTERS = ("mma16", "mma8", "ldmatrix", "conflicts", "ex2", "barriers", "copies", "shfl", "wgmma", "tma")


class _Stats(ctypes.Structure):
    _fields_ = [(name, ctypes.c_long) for name in COUNTERS]


class Emulator:
    """A launcher for runtime.kernels: `emulator(launch, params)`. `counts` sums what ran; schedule orders the warps."""

    def __init__(self, schedule: int = 0):
        self.schedule, self.counts = schedule, Counter()

    def __call__(self, launch: Launch, params: Params) -> None:
        run = library(KERNELS, *instances_beside(launch.kernel)).emulate
        run.argtypes = [
            ctypes.c_char_p,
            ctypes.c_void_p,
            *[ctypes.c_uint] * 3,
            ctypes.c_int,
            ctypes.c_long,
            ctypes.c_uint,
        ]
        run.argtypes += [ctypes.c_void_p]
        stats = _Stats()
        call = launch.kernel.encode(), ctypes.addressof(params), *launch.grid, launch.threads, launch.shared
        assert run(*call, self.schedule, ctypes.addressof(stats)) == 0, f"no instance {launch.kernel}"
        self.counts.update({name: getattr(stats, name) for name in COUNTERS})


def instances(width: int, dtype: torch.dtype) -> list[str]:
    """The instances that the host launches for heads of this width."""
    tiles = host.TILES[width]
    q = torch.empty(1, 1, 1, width, dtype=dtype, device="meta")
    many = torch.empty(1, 1000, 1, width, dtype=dtype, device="meta")
    launches = [host.forward_launch(q, q), host.forward_launch(q, many), *host.backward_launches(q, q)]
    launches.append(hopper.hopper_launch(q, q))
    if width == 40:
        launches.append(host.forward_launch(q, many, replace(tiles.forward, poly=4)))
    return [launch.kernel for launch in launches]


@functools.cache
def instances_beside(kernel: str) -> tuple[str, ...]:
    """The group of instances that is compiled together with this one; alone where no group has it."""
    groups = (tuple(instances(width, dtype)) for width in host.TILES for dtype in host.C_NAME)
    return next((group for group in groups if kernel in group), (kernel,))


def _entry(name: str) -> str:
    of_hopper = name.startswith("forward_sm90<")
    return f"HOPPER({name[len('forward_sm90<') : -1]})" if of_hopper else f"INSTANCE({name})"


@functools.cache
def library(kernels: Path, *names: str) -> ctypes.CDLL:
    table = "\n".join(map(_entry, names))
    files = sorted([*SHIM.iterdir(), *kernels.glob("*.cu"), *kernels.glob("*.cuh")])
    key = hashlib.sha256(repr([COMMAND, table, *((f.name, f.read_bytes()) for f in files)]).encode()).hexdigest()[:20]
    built = Path(tempfile.gettempdir(), "minisd-emulator", f"{key}.so")
    if not built.exists():
        built.parent.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=built.parent) as folder:
            Path(folder, "instances.inc").write_text(table)
            include = [f"-I{folder}", f"-I{SHIM}", f"-I{kernels}"]
            made = Path(folder, built.name)
            done = subprocess.run([*COMMAND, *include, "-o", made, SHIM / "main.cpp"], capture_output=True, text=True)
            assert done.returncode == 0, f"g++ cannot build the kernels: {done.stderr[:3000]}"
            made.rename(built)
    return ctypes.CDLL(str(built))
