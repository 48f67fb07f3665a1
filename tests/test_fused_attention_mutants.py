"""Would the tests notice? Every planted bug of the kernels has to change a result, to abort, or to be counted."""

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


@pytest.mark.parametrize("name", MUTANTS)
def test_a_planted_bug_is_caught(name, tmp_path):
    old, new = MUTANTS[name]
    kernels = tmp_path / "kernels"
    kernels.mkdir()
    for file in [*KERNELS.glob("*.cu"), *KERNELS.glob("*.cuh")]:
        shutil.copy(file, kernels)
    source = (kernels / "attention.cu").read_text()
    assert old in source, "the mutant no longer fits the kernel: write it again"
    (kernels / "attention.cu").write_text(source.replace(old, new, 1))
    plugin = tmp_path / "mutant.py"
    plugin.write_text(f"import emulated, pathlib\nemulated.KERNELS = pathlib.Path({str(kernels)!r})\n")
    tests = str(Path(__file__).with_name("test_fused_attention.py"))
    # a few widths and one dtype see every line: 40 ends in half a step, 160 keeps rows in shared memory
    chosen = "(40 or 160 or view or conflicts) and not bfloat16 or order"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-x",
        "-q",
        "-p",
        "mutant",
        "-p",
        "no:cacheprovider",
        "-k",
        chosen,
        tests,
    ]
    path = f"{tmp_path}:{Path(__file__).parent}:{Path(__file__).parent.parent}"
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env={"PYTHONPATH": path, "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode not in (0, 2, 3, 4, 5), f"not caught: {done.stdout[-2000:]}{done.stderr[-2000:]}"
    assert "g++ cannot build" not in done.stdout, "the mutant does not compile"
