"""Prove and measure the attention kernels on a GPU: three commands, each well within ten minutes.

    python scripts/attention_on_gpu.py check               # conformance, numerics, gradients, compute-sanitizer
    python scripts/attention_on_gpu.py sweep               # every tile that spills nothing; edit launch.TILES by it
    python scripts/attention_on_gpu.py bench --write       # beside every other form; its table goes into measured.json

Times are microseconds a call in a CUDA graph of many calls, the median of replays; run `bench` twice, and take what
differs less than the two runs do for equal. `--dry` walks the same way on a CPU, on small shapes, without times.
"""

from __future__ import annotations

import argparse
import datetime
import json
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from emulated import Emulator  # noqa: E402

from minisd.kernels import attention, fused, launch  # noqa: E402
from minisd.kernels.choice import MEASURED  # noqa: E402
from minisd.kernels.nvrtc import arch_of, compile_kernel  # noqa: E402

LEVELS = {  # heads, tokens, width of every attention of a network
    "sd1 512": [(8, 4096, 40), (8, 1024, 80), (8, 256, 160), (8, 64, 160)],
    "sd2 512": [(5, 4096, 64), (10, 1024, 64), (20, 256, 64), (20, 64, 64)],
    "sd2 768": [(5, 9216, 64), (10, 2304, 64), (20, 576, 64), (20, 144, 64)],
}
SHAPES = [(h, n, m, d) for levels in LEVELS.values() for h, n, d in levels for m in (n, 77)] + [(1, 4096, 4096, 512)]
OURS = {"fused", "hopper"}
H200 = {"mma": 790e12, "exp": 16 * 132 * 1.98e9, "memory": 4.3e12, "launch": 2e-6}  # measured rates; one graph node


def floor(b: int, h: int, n: int, m: int, d: int) -> float:
    """Seconds that no forward on an H200 can be quicker than."""
    scores = b * h * n * m
    products = 2 * scores * (-(-d // 16) * 16 + d) / H200["mma"]
    return max(products, scores / H200["exp"], 4 * b * h * d * (n + m) / H200["memory"], H200["launch"])


def forms(dry: bool) -> dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
    """Everything that can be compared: ours, torch's default and each of its backends alone, flash-attn's if there."""

    def alone(backend, q, k, v):
        with sdpa_kernel(backend):
            return attention(q, k, v, impl="sdpa")

    ours = (lambda q, k, v: fused.forward(q, k, v, q.shape[-1] ** -0.5, launcher=Emulator())[0]) if dry else None
    found = {"fused": ours or partial(attention, impl="fused")}
    found |= {name: partial(attention, impl=name) for name in ("sdpa", "matmul", *([] if dry else ["hopper"]))}
    backends = ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION", "MATH")
    found |= {f"sdpa:{name.split('_')[0].lower()}": partial(alone, getattr(SDPBackend, name)) for name in backends}
    for name, module in (("fa2", "flash_attn"), ("fa3", "flash_attn_interface"), ("fa4", "flash_attn.cute")):
        try:
            function = __import__(module, fromlist=["flash_attn_func"]).flash_attn_func
        except (ImportError, AttributeError):
            continue
        found[name] = lambda q, k, v, f=function: (lambda out: out[0] if isinstance(out, tuple) else out)(f(q, k, v))
    return found


def exact(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.cat([attention(part.double(), k.double(), v.double(), impl="naive") for part in q.split(1024, 1)], 1)


def distance(x: Tensor, y: Tensor) -> float:
    return ((x.double() - y).norm() / y.norm()).item()


def seconds(f: Callable[[], object], calls: int = 20, replays: int = 15) -> float:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            f()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            f()
    times = []
    for _ in range(replays + 3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e-3 / calls)
    return statistics.median(times[3:])


def tensors(shape, dtype, dry: bool, grad: bool = False) -> list[Tensor]:
    h, n, m, d = shape
    b, h, n, m = (1, 1, min(n, 100), min(m, 100)) if dry else (1 if d == 512 else 2, h, n, m)
    made = [torch.randn(b, tokens, h, d, device="cpu" if dry else "cuda").to(dtype) for tokens in (n, m, m)]
    return [x.requires_grad_() for x in made] if grad else made


def training(f, inputs):
    out = f(*inputs)
    torch.autograd.grad(out, inputs, torch.ones_like(out))


def bench(options: argparse.Namespace) -> None:
    rows, dtype = [], getattr(torch, options.dtype)
    for shape, passes in product(SHAPES, ("forward",) if options.dry else ("forward", "training")):
        h, n, m, d = shape
        inputs = tensors(shape, dtype, options.dry, passes == "training")
        expected = exact(*(x.detach() for x in inputs))
        unit = distance(expected.to(dtype), expected)
        times, errors = {}, {}
        for name, form in forms(options.dry).items():
            try:
                errors[name] = distance(form(*inputs).detach(), expected)
                run = partial(form, *inputs) if passes == "forward" else partial(training, form, inputs)
                times[name] = 0.0 if options.dry else seconds(run, 5 if n > 4000 else 20) * 1e6
            except Exception as problem:  # a peer that does not take this shape is no reason to stop
                print(f"  {name} cannot: {str(problem).splitlines()[0][:100]}")
        for name in OURS & set(errors):
            assert errors[name] < 1.5 * unit, f"{name} is off by {errors[name]:.1e}, rounding is {unit:.1e}"
        peers = {name: t for name, t in times.items() if name not in OURS}
        best, ours = min(peers, key=peers.get), min((times[name] for name in OURS & set(times)), default=None)
        least = floor(inputs[0].shape[0], h, n, m, d) * 1e6
        ratio = f"{peers[best] / ours:.2f}x of {best}" if ours else f"not timed; best is {best}"
        print(
            f"{passes} {h}x{n}x{m} d{d}: {ratio}, floor {least:.1f}",
            {k: round(t, 1) for k, t in times.items()},
            flush=True,
        )
        mine = {name: round(times[name], 2) for name in ("sdpa", "fused", "hopper", "matmul") if name in times}
        row = {"dtype": options.dtype, "heads": inputs[0].shape[0] * h, "n": n, "m": m, "d": d, "pass": passes}
        rows.append({**row, "us": mine, "all": {k: round(t, 2) for k, t in times.items()}, "errors": errors})
    if options.out:
        Path(options.out).write_text(json.dumps({**machine(), "rows": rows}, indent=1))
    if options.write and not options.dry:
        write_table(rows)


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
    fields = ("dtype", "heads", "n", "m", "d", "pass", "us")
    new = [{field: row[field] for field in fields} for row in rows if "sdpa" in row["us"]]
    written |= {"written": here["date"], "tables": [*kept, {**here, "rows": old + new}]}
    MEASURED.write_text(json.dumps(written, indent=1) + "\n")


def sweep(options: argparse.Namespace) -> None:
    """Forward tiles, quickest first, for every shape; those that spill on this GPU are left out."""
    dtype = getattr(torch, options.dtype)
    arch = "sm_90a" if options.dry else arch_of(torch.cuda.get_device_capability())
    for shape in SHAPES[: 1 if options.dry else None]:
        h, n, m, d = shape
        if d not in launch.TILES:
            continue
        q, k, v = tensors(shape, dtype, options.dry)
        found = []
        for rows, warps, r, poly in product((16, 32, 48, 64, 80, 96, 128), (2, 4, 8), (1, 2), (0, 4)):
            tile = launch.Tile(rows, warps, r, poly)
            one = launch.forward_launch(q, k, tile)
            too_large = one.shared > 227 * 1024 or (m == 77 and rows < 77) or (d > 80 and r == 2)
            if too_large or (options.dry and (rows, warps) != (32, 4)):
                continue
            compiled = compile_kernel(one.kernel, arch)
            if compiled.spilled:
                continue
            run = partial(forward_by, tile, q, k, v, options.dry)
            found.append((0.0 if options.dry else seconds(run) * 1e6, tile, compiled.registers))
            if options.dry:
                run()
        found.sort(key=lambda one: one[0])
        for time, tile, registers in found[:5]:
            print(f"{h}x{n}x{m} d{d}: {time:8.1f} us  {tile}  {registers} registers", flush=True)


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
        inputs = tensors(shape, torch.bfloat16, False, grad=True)
        f32 = [x.detach().float().requires_grad_() for x in inputs]
        dout = torch.randn_like(inputs[0])
        found = torch.autograd.grad(attention(*inputs, impl="fused"), inputs, dout)
        peer = torch.autograd.grad(attention(*inputs, impl="sdpa"), inputs, dout)
        expected = torch.autograd.grad(
            F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in f32)).transpose(1, 2), f32, dout.float()
        )
        errors = [distance(x, y.double()) for x, y in zip(found, expected, strict=True)]
        peers = [distance(x, y.double()) for x, y in zip(peer, expected, strict=True)]
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
    parser.add_argument("--out", help="a JSON file for all times and errors of bench")
    parser.add_argument("--write", action="store_true", help="put bench's table into minisd/kernels/measured.json")
    parser.add_argument("--dry", action="store_true", help="on a CPU, on small shapes, without times")
    chosen = parser.parse_args()
    if not chosen.dry and not torch.cuda.is_available():
        parser.error("there is no CUDA GPU here; --dry walks through the same on a CPU")
    commands[chosen.command](chosen)
