"""Prove and measure the attention kernels on a GPU: three commands, each well within ten minutes.

    python scripts/attention_on_gpu.py check               # conformance, numerics, gradients, compute-sanitizer
    python scripts/attention_on_gpu.py sweep               # every tile that spills nothing; edit launch.TILES by it
    python scripts/attention_on_gpu.py bench --write       # beside every other implementation; fills measured.json

`bench` is `minisd bench attention --device cuda --training`, and writes the table; run it twice: differences no larger
than between the two are noise. `--dry` runs the same on a CPU, on small shapes, without timing.
"""

from __future__ import annotations

import argparse
import datetime
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from emulated import Emulator  # noqa: E402

from minisd.bench.attention import SHAPES, AttentionShape, bench_attention, timer  # noqa: E402
from minisd.bench.options import BenchOptions  # noqa: E402
from minisd.bench.pairs import relative_error  # noqa: E402
from minisd.bench.publish import publish  # noqa: E402
from minisd.bench.report import BenchReport  # noqa: E402
from minisd.runtime.kernels import attention, fused, launch  # noqa: E402
from minisd.runtime.kernels.choice import MEASURED  # noqa: E402
from minisd.runtime.kernels.nvrtc import arch_of, compile_kernel  # noqa: E402

OURS = {"fused", "hopper"}
CHOICES = ("sdpa", "fused", "hopper", "matmul")  # of `auto` on a GPU
H200 = {"mma": 790e12, "exp": 16 * 132 * 1.98e9, "memory": 4.3e12, "launch": 2e-6}  # measured rates; one graph node


def floor(shape: AttentionShape) -> float:
    """A lower bound in seconds for any forward pass on an H200."""
    scores = shape.b * shape.i * shape.n * shape.m
    products = 2 * scores * (-(-shape.d // 16) * 16 + shape.d) / H200["mma"]
    moved = 4 * shape.b * shape.i * shape.d * (shape.n + shape.m)
    return max(products, scores / H200["exp"], moved / H200["memory"], H200["launch"])


def small_shapes() -> list[AttentionShape]:
    """The shapes of --dry."""
    return [AttentionShape(1, 1, min(shape.n, 100), min(shape.m, 100), shape.d) for shape in SHAPES]


def bench(options: argparse.Namespace) -> None:
    """`minisd bench attention` with the backward pass, then the table for measured.json."""
    settings = BenchOptions(dtype=options.dtype, device="cpu" if options.dry else "cuda", pairs=1 if options.dry else 7)
    emulated = {"fused": lambda q, k, v: fused.forward(q, k, v, q.shape[-1] ** -0.5, launcher=Emulator())[0]}
    shapes, replaced = (small_shapes(), emulated) if options.dry else (SHAPES, None)
    report = bench_attention(settings, training=not options.dry, shapes=shapes, replaced=replaced)
    for case, shape in zip(report.cases, [s for s in shapes for _ in range(1 if options.dry else 2)], strict=True):
        ours = min((case.results[name].median for name in OURS & set(case.results)), default=float("nan"))
        ratio = ours / min(r.median for name, r in case.results.items() if name not in OURS)
        print(f"{case.label}: kernels {ratio:.2f} of the fastest other, lower bound {floor(shape) * 1e6:.1f} µs")
    if publish([report], replace(settings, json=options.out and Path(options.out))):
        sys.exit(1)
    if options.write and not options.dry:
        write_table(rows(report, options.dtype))


def rows(report: BenchReport, dtype: str) -> list[dict]:
    """measured.json's row of each case: µs of the implementations that `auto` chooses from; heads over the batch."""
    table = []
    for case, shape in zip(report.cases, [shape for shape in SHAPES for _ in range(2)], strict=True):
        us = {name: round(case.results[name].median * 1e6, 2) for name in CHOICES if name in case.results}
        row = {"dtype": dtype, "heads": shape.b * shape.i, "n": shape.n, "m": shape.m, "d": shape.d}
        table.append({**row, "pass": case.label["pass"], "us": us})
    return table


def machine() -> dict:
    if not torch.cuda.is_available():
        return {"gpu": "none", "torch": torch.__version__}
    versions = {"torch": torch.__version__, "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    driver = subprocess.run(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True)
    today = datetime.date.today().isoformat()
    return {"gpu": torch.cuda.get_device_name(), "date": today, **versions, "driver": driver.stdout.decode().strip()}


def write_table(rows: list[dict]) -> None:
    """This GPU's table in measured.json: rows of other dtypes stay, those of this one are replaced."""
    written, here = json.loads(MEASURED.read_text()), machine()
    kept = [t for t in written["tables"] if t["gpu"] != here["gpu"]]
    old = [row for t in written["tables"] if t["gpu"] == here["gpu"] for row in t["rows"]]
    old = [row for row in old if row["dtype"] != rows[0]["dtype"]]
    new = [row for row in rows if "sdpa" in row["us"]]
    written |= {"written": here["date"], "tables": [*kept, {**here, "rows": old + new}]}
    MEASURED.write_text(json.dumps(written, indent=1) + "\n")


def sweep(options: argparse.Namespace) -> None:
    """Forward tiles, fastest first, for every shape; without those that spill registers on this GPU."""
    dtype = getattr(torch, options.dtype)
    arch = "sm_90a" if options.dry else arch_of(torch.cuda.get_device_capability())
    for shape in small_shapes()[:1] if options.dry else SHAPES:
        if shape.d not in launch.TILES:
            continue
        q, k, v = shape.tensors(dtype, "cpu" if options.dry else "cuda")
        timings = []
        for rows, warps, r, poly in product((16, 32, 48, 64, 80, 96, 128), (2, 4, 8), (1, 2), (0, 4)):
            tile = launch.Tile(rows, warps, r, poly)
            one = launch.forward_launch(q, k, tile)
            too_large = one.shared > 227 * 1024 or (shape.m == 77 and rows < 77) or (shape.d > 80 and r == 2)
            if too_large or (options.dry and (rows, warps) != (32, 4)):
                continue
            compiled = compile_kernel(one.kernel, arch)
            if compiled.spilled:
                continue
            run = partial(forward_by, tile, q, k, v, options.dry)
            timings.append((0.0 if options.dry else timer(run, "cuda")() * 1e6, tile, compiled.registers))
            if options.dry:
                run()
        timings.sort(key=lambda timing: timing[0])
        for time, tile, registers in timings[:5]:
            print(f"{shape}: {time:8.1f} us  {tile}  {registers} registers", flush=True)


def forward_by(tile: launch.Tile, q: Tensor, k: Tensor, v: Tensor, dry: bool) -> Tensor:
    o, lse = torch.empty_like(q), q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=torch.float32)
    params = launch.Params.of(q.shape[-1] ** -0.5, lse, q=q, k=k, v=v, o=o)
    (Emulator() if dry else launch.cuda_launch)(launch.forward_launch(q, k, tile), params)
    return o


def check(options: argparse.Namespace) -> None:
    """The test files on this GPU, gradients in training shapes, and compute-sanitizer over small launches."""
    print(machine())
    tests = [str(p) for p in sorted((ROOT / "tests").glob("test_fused_attention*.py"))]
    failed = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests], cwd=ROOT
    ).returncode
    for shape in SHAPES[:8] if not options.dry else []:
        inputs = shape.tensors(torch.bfloat16, "cuda", grad=True)
        f32 = [x.detach().float().requires_grad_() for x in inputs]
        dout = torch.randn_like(inputs[0])
        fused_gradients = torch.autograd.grad(attention(*inputs, impl="fused"), inputs, dout)
        sdpa_gradients = torch.autograd.grad(attention(*inputs, impl="sdpa"), inputs, dout)
        expected = torch.autograd.grad(
            F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in f32)).transpose(1, 2), f32, dout.float()
        )
        errors = [relative_error(x, y.double()) for x, y in zip(fused_gradients, expected, strict=True)]
        peers = [relative_error(x, y.double()) for x, y in zip(sdpa_gradients, expected, strict=True)]
        print(f"gradients {shape}: ours {[f'{e:.1e}' for e in errors]} sdpa {[f'{e:.1e}' for e in peers]}", flush=True)
        failed |= any(not e < max(7e-3, 1.5 * p) for e, p in zip(errors, peers, strict=True))
    for tool in ("memcheck", "racecheck") if shutil.which("compute-sanitizer") and not options.dry else ():
        command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", sys.executable, __file__, "small"]
        failed |= subprocess.run(command, cwd=ROOT).returncode
    if not shutil.which("compute-sanitizer"):
        print("compute-sanitizer is not on the PATH: memcheck and racecheck did not run")
    print("FAILED" if failed else "all passed")
    sys.exit(bool(failed))


def small(options: argparse.Namespace) -> None:
    """Every kernel once or twice, for compute-sanitizer."""
    where, by = (torch.device("cpu"), Emulator()) if options.dry else (torch.device("cuda"), None)
    kernels = fused.KERNELS if options.dry or torch.cuda.get_device_capability() == (9, 0) else ("forward", "backward")
    for d, dtype, kernel in product(launch.TILES, launch.C_NAME, kernels):
        error = fused.self_check(where, d, dtype, kernel, by or fused.KERNELS[kernel])
        assert error < fused.TOLERANCE[dtype], (d, dtype, error)
    print("every kernel ran")


if __name__ == "__main__":
    commands = {"check": check, "bench": bench, "sweep": sweep, "small": small}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=commands)
    parser.add_argument("--dtype", default="float16", choices=["float16", "bfloat16"])
    parser.add_argument("--out", help="JSON file for all times and errors of bench")
    parser.add_argument("--write", action="store_true", help="write bench's table into measured.json")
    parser.add_argument("--dry", action="store_true", help="run on a CPU, on small shapes, without timing")
    chosen = parser.parse_args()
    if not chosen.dry and not torch.cuda.is_available():
        parser.error("no CUDA GPU here; --dry runs the same on a CPU")
    commands[chosen.command](chosen)
