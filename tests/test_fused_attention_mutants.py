"""Would the tests notice? Every planted bug of the kernels has to change a result, to abort, or to be counted."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from emulated import KERNELS

pytestmark = pytest.mark.full

BARRIER = "            __syncthreads();  // tile j has arrived and every warp has left the other buffer\n"
NEXT = "            if ((j + 1) * N < n) load(j + 1);\n"
WAIT = "            cp_async_wait<0>();\n"
MUTANTS = {  # name: (what is written, what it becomes)
    "no barrier": (BARRIER, ""),
    "a wait that leaves one group": ("cp_async_wait<0>()", "cp_async_wait<1>()"),
    "the next tile loaded before the barrier": (BARRIER + NEXT, NEXT + BARRIER),
    "the barrier before the wait": (WAIT + BARRIER, BARRIER + WAIT),
    "one buffer for two tiles": ("smem + (BUFFERS + j % BUFFERS) * TILE + to[i]", "smem + BUFFERS * TILE + to[i]"),
    "two buffers where one is there": ("for_tiles<ONE_TILE ? 1 : 2>", "for_tiles<2>"),
    "B registers swapped": ("a[r][1], b[2], b[3])", "a[r][1], b[3], b[2])"),
    "A of the wrong half": (
        "rows.template fragment<16>(a[r][1], r, c + 2)",
        "rows.template fragment<16>(a[r][1], r, c)",
    ),
    "rows in shared memory of another warp": ("threadIdx.x / 32 * 16 * R + threadIdx.x % 16", "threadIdx.x % 16"),
    "halves of P swapped": (
        "pack<T>(s[r][n + i / 2][i % 2 * 2], s[r][n + i / 2][i % 2 * 2 + 1])",
        "pack<T>(s[r][n + i / 2][i % 2 * 2 + 1], s[r][n + i / 2][i % 2 * 2])",
    ),
    "V not transposed": ("ldmatrix<2, true>(b, row + c * 8)", "ldmatrix<2, false>(b, row + c * 8)"),
    "lanes of the transposed load": ("row + (c + lane / 16) * 8", "row + (c + lane / 8 % 2) * 8"),
    "no mask": ("s[i / 4][n][i % 4] = -INF;", ";"),
    "mask off by one": (">= p.nk) s[i / 4]", "> p.nk) s[i / 4]"),
    "keys copied past the end": ("x + n0 * xs + xfrom[i], row[i] < left)", "x + n0 * xs + xfrom[i], true)"),
    "sum not rescaled": ("l[i] * alpha[i] + sum", "l[i] + sum"),
    "output not rescaled": ("o[i / 4][c][i % 4] *= alpha[i / 2];", ";"),
    "maximum over two lanes": ("            mx = fmaxf(mx, shfl_xor(mx, 2));\n", ""),
    "sum over two lanes": ("            l[i] += shfl_xor(l[i], 2);\n", ""),
    "bank conflicts": ("static constexpr int LD = (C | 1) * 8;", "static constexpr int LD = C * 8;"),
    "queries stored past the end": ("            if (row < n)\n", ""),
    "a collective under divergence": (
        "            mx = fmaxf(mx, shfl_xor(mx, 1));",
        "            if (threadIdx.x % 32 < 31) mx = fmaxf(mx, shfl_xor(mx, 1));",
    ),
    "lse without the maximum": ("m[i] * p.scale_log2 + log2f(l[i])", "log2f(l[i])"),
    "dq: no mask": ("valid ? x * (dp", "true ? x * (dp"),
    "dq: delta over two lanes": ("            delta[i] += shfl_xor(delta[i], 2);\n", ""),
    "dq: delta of half the row": ("fmaf(x[0], y[0], fmaf(x[1], y[1], delta[i]))", "fmaf(x[0], y[0], delta[i])"),
    "dkv: lse of another row": ("const int row = q0 + n * 8 + t * 2 + j;", "const int row = q0 + n * 8 + t * 2;"),
    "dkv: sign of delta": ("x * (dp[i / 4][n][i % 4] - delta);", "x * (dp[i / 4][n][i % 4] + delta);"),
    "dk not scaled": ("dk, scale);", "dk, one);"),
    "v in the strides of k": (
        "p.v.at(batch, head), p.v.token, p.nk, body",
        "p.v.at(batch, head), p.k.token, p.nk, body",
    ),
    "the head's stride for the batch": ("data + b * batch + h * head", "data + b * head + h * head"),
}

SCORES = "            wgmma_wait<1>();  // the scores are there, P V is still running\n"
K_FREE = "            if (leader) mbar_arrive(kfree + 8 * st);\n"
OUTPUT = "            wgmma_wait<0>();\n"
V_FREE = "            if (leader) mbar_arrive(vfree + 8 * before);\n"
# K freed before it was read is not among them: the producer's order K_j, V_j, K_(j+1) makes it wait for a later V.
HOPPER_MUTANTS = {
    "offsets of V's descriptor swapped": (
        "descriptor(v + n * 512, N * 32, 256)",
        "descriptor(v + n * 512, 256, N * 32)",
    ),
    "V freed early": (OUTPUT + V_FREE, V_FREE + OUTPUT),
    "scores read early": (SCORES, SCORES.replace("<1>", "<2>")),
    "output read early": (OUTPUT + V_FREE, V_FREE),
    "V not waited for": ("            mbar_wait(vfull + 8 * before, (j - 1) / STAGES & 1);\n", ""),
    "another phase": ("mbar_wait(kfree + 8 * st, (round & 1) ^ 1);", "mbar_wait(kfree + 8 * st, round & 1);"),
    "another count": ("mbar_init(kfree + 8 * i, WGS)", "mbar_init(kfree + 8 * i, 1)"),
    "other bytes": ("mbar_expect(vfull + 8 * st, KBYTES);", "mbar_expect(vfull + 8 * st, KBYTES - 32);"),
    "output not rescaled": ("o[c][i] *= alpha[i / 2];", ";"),
    "no mask": ("s[0][n][i] = -INF;", ";"),
    "base not aligned": ("(smem_ptr(raw) + 1023) & ~1023u", "smem_ptr(raw)"),
    "queries stored past the end": ("            if (row < p.nq) {", "            {"),
}


# A few widths and one dtype see every line: 40 ends in half a step, 160 keeps rows in shared memory.
PORTABLE = ("attention.cu", "test_fused_attention.py", "(40 or 160 or view or conflicts) and not bfloat16 or order")
HOPPER = (
    "attention_sm90.cu",
    "test_fused_attention_hopper.py",
    "(40 or 80 or order) and not bfloat16 and not compiles",
)


@pytest.mark.parametrize("kernels", [PORTABLE, HOPPER], ids=["portable", "hopper"])
def test_the_kernels_as_they_are_pass(kernels, tmp_path):
    done = run_with("", "", *kernels, tmp_path)
    assert done.returncode == 0, done.stdout[-2000:]


@pytest.mark.parametrize("name", MUTANTS)
def test_a_planted_bug_is_caught(name, tmp_path):
    assert_caught(run_with(*MUTANTS[name], *PORTABLE, tmp_path))


@pytest.mark.parametrize("name", HOPPER_MUTANTS)
def test_a_bug_planted_in_the_hopper_kernel_is_caught(name, tmp_path):
    assert_caught(run_with(*HOPPER_MUTANTS[name], *HOPPER, tmp_path))


def assert_caught(done):
    """By a failed test (1), or by the shim, which aborts the process (below 0); pytest's other codes are its own."""
    assert done.returncode == 1 or done.returncode < 0, f"not caught: {done.stdout[-2000:]}{done.stderr[-2000:]}"
    assert "g++ cannot build" not in done.stdout, "the mutant does not compile"


def run_with(old, new, file, tests, chosen, tmp_path):
    """The tests of the kernels, in a process of their own, on a copy in which `old` is replaced once."""
    kernels = tmp_path / "kernels"
    kernels.mkdir()
    for each in [*KERNELS.glob("*.cu"), *KERNELS.glob("*.cuh")]:
        shutil.copy(each, kernels)
    source = (kernels / file).read_text()
    assert old in source, "the mutant no longer fits the kernel: write it again"
    (kernels / file).write_text(source.replace(old, new, 1))
    plugin = tmp_path / "mutant.py"
    plugin.write_text(f"import emulated, pathlib\nemulated.KERNELS = pathlib.Path({str(kernels)!r})\n")
    command = f"{sys.executable} -m pytest -x -q -p mutant -p no:cacheprovider -k".split()
    here = Path(__file__).parent
    environment = {"PYTHONPATH": f"{tmp_path}:{here}:{here.parent}", "PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1"}
    return subprocess.run([*command, chosen, str(here / tests)], capture_output=True, text=True, env=environment)
