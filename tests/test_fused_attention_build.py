"""The kernels compiled for real GPUs, by NVRTC, which needs none: within their registers, spilling nothing."""

import subprocess
import sys

import pytest
import torch
from emulated import instances

from minisd.runtime.kernels.launch import TILES, backward_launches, forward_launch
from minisd.runtime.kernels.nvrtc import arch_of, compile_kernel

SMALLEST_SHARED_MEMORY = 99 * 1024  # bytes a block may take: sm_86, sm_89 and sm_120
KERNEL_NAMES = [name for d in TILES for name in instances(d, torch.float16) if "sm90" not in name]


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
@pytest.mark.parametrize("kernel", KERNEL_NAMES)
def test_no_kernel_spills_a_register(kernel, arch):
    compiled = compile_kernel(kernel, arch)
    assert compiled.spilled == 0
    assert 32 < compiled.registers <= 255
    if arch == "sm_90a" and kernel.startswith("forward<Half, 40, 64"):
        assert compiled.registers <= 184  # the largest shape of Stable Diffusion 1: 11 of a multiprocessor's 64 warps


@pytest.mark.parametrize("arch", ["sm_86", "sm_120"])
@pytest.mark.parametrize("kernel", ["forward<Bf16, 40, 80, 4, 1, true, 0>", "backward_dkv<Bf16, 160, 16, 4, 1>"])
def test_kernels_compile_for_other_gpus_and_for_bf16(kernel, arch):
    assert compile_kernel(kernel, arch).cubin.startswith(b"\x7fELF")


@pytest.mark.parametrize("d", TILES)
@pytest.mark.parametrize("m", [77, 4096])
def test_every_gpu_since_ampere_has_the_shared_memory(d, m):
    q, k = (torch.empty(1, n, 1, d, dtype=torch.float16, device="meta") for n in (64, m))
    for launch in (forward_launch(q, k), *backward_launches(q, k)):
        assert launch.shared <= SMALLEST_SHARED_MEMORY


def test_hopper_is_compiled_for_with_its_own_instructions():
    assert [arch_of(c) for c in ((8, 0), (8, 9), (9, 0), (10, 0), (12, 0))] == [
        "sm_80",
        "sm_89",
        "sm_90a",
        "sm_100",
        "sm_120",
    ]


def test_what_the_compiler_refuses_is_told_in_its_own_words():
    with pytest.raises(RuntimeError, match=r"NVRTC \d+\.\d+ cannot compile forward<Half, 44, .* for sm_80"):
        compile_kernel("forward<Half, 44, 64, 4, 1, false, 0>", "sm_80")


def test_a_missing_compiler_is_named_with_what_to_install():
    code = (
        "import sys; sys.modules['cuda.bindings'] = None\n"
        "from minisd.runtime.kernels.nvrtc import compile_kernel\n"
        "compile_kernel('forward<Half, 40, 64, 4, 1, false, 0>', 'sm_80')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "CompilerMissing" in done.stderr
    assert "pip install cuda-bindings nvidia-cuda-nvrtc" in done.stderr
