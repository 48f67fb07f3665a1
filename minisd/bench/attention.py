"""`minisd bench attention`: every implementation of attention in Stable Diffusion's shapes, held to float64."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from minisd.bench.machine import machine, matmul, matmul_flop
from minisd.bench.options import BenchOptions
from minisd.bench.pairs import FLOAT32_ERROR, ContenderResult, MeasuredCase, log, relative_error
from minisd.bench.process import MIN_SECONDS
from minisd.bench.report import BenchReport
from minisd.runtime.kernels import attention
from minisd.runtime.kernels.attention import IMPLEMENTATIONS

AttentionFunction = Callable[[Tensor, Tensor, Tensor], Tensor]
OWN = ("minisd", *(name for name in IMPLEMENTATIONS if name != "sdpa"))  # "minisd": what its networks run ("auto")
ALLOWED_ROUNDINGS = 1.5  # × the error of rounding the exact result to the dtype; √2 more where weights are rounded too
ROUND_ONCE = ("naive", "sdpa32", "fused", "hopper")  # these round the result alone
CALLS = 20  # captured into one CUDA graph


@dataclass(frozen=True)
class AttentionShape:
    """Queries 'b n i d', keys and values 'b m i d'."""

    b: int
    i: int
    n: int
    m: int
    d: int

    def tensors(self, dtype: torch.dtype, device: str, *, grad: bool = False) -> list[Tensor]:
        qkv = [torch.randn(self.b, tokens, self.i, self.d, device=device) for tokens in (self.n, self.m, self.m)]
        return [x.to(dtype).requires_grad_(grad) for x in qkv]


LEVELS = {  # heads, tokens, width of every attention of a network
    "sd1 512": [(8, 4096, 40), (8, 1024, 80), (8, 256, 160), (8, 64, 160)],
    "sd2 512": [(5, 4096, 64), (10, 1024, 64), (20, 256, 64), (20, 64, 64)],
    "sd2 768": [(5, 9216, 64), (10, 2304, 64), (20, 576, 64), (20, 144, 64)],
}
# self- and cross-attention of one image with guidance, and the VAE's
SHAPES = [AttentionShape(2, i, n, m, d) for levels in LEVELS.values() for i, n, d in levels for m in (n, 77)]
SHAPES.append(AttentionShape(1, 1, 4096, 4096, 512))


def bench_attention(
    options: BenchOptions,
    *,
    training: bool = False,
    shapes: Iterable[AttentionShape] = SHAPES,
    replaced: dict[str, AttentionFunction] | None = None,
) -> BenchReport:
    """Seconds and error of every implementation in every shape. training: also of forward and backward together.

    A GPU's times are those of a CUDA graph of many calls. replaced: stand-ins for the implementations of these names.
    """
    options.check()
    functions = implementations(options.peers) | (replaced or {})
    report = BenchReport("attention", "softmax(q kᵀ · scale) v", machine(options.device), options)
    product = timer(matmul(options.dtype, options.device), options.device)
    peak = matmul_flop(options.device) / min(product() for _ in range(3))
    unsupported: dict[str, str] = {}
    for shape in shapes:
        for backward in (False, True) if training else (False,):
            case = measure_implementations(shape, functions, options, backward=backward)
            for name, result in list(case.results.items()):
                if result.failed:
                    unsupported.setdefault(name, result.failed)
                    del case.results[name]
            case.peak_flops = peak
            report.cases.append(case)
    if unsupported:
        reasons = "; ".join(f"{name} ({reason})" for name, reason in unsupported.items())
        report.notes.append(f"Left out where unsupported: {reasons}")
    return report


def implementations(peers: tuple[str, ...] | None = None) -> dict[str, AttentionFunction]:
    """minisd's "auto" and its implementations by name, PyTorch's choice ("sdpa"), each of its backends, flash-attn's.

    peers: of those that are not minisd's, only these; None for all that can be imported.
    """
    functions: dict[str, AttentionFunction] = {"minisd": attention}
    functions |= {name: partial(attention, impl=name) for name in IMPLEMENTATIONS}
    for backend in (name for name in SDPBackend.__members__ if name.endswith(("ATTENTION", "MATH"))):
        functions[f"sdpa:{backend.split('_')[0].lower()}"] = partial(_sdpa_backend, SDPBackend.__members__[backend])
    for name, module in (("fa2", "flash_attn"), ("fa3", "flash_attn_interface"), ("fa4", "flash_attn.cute")):
        try:
            function = __import__(module, fromlist=["flash_attn_func"]).flash_attn_func
        except (ImportError, AttributeError):
            continue
        functions[name] = partial(_without_extras, function)
    if peers is None:
        return functions
    others = [name for name in functions if name not in OWN]
    for name in peers:
        if name not in (*others, "none"):
            raise ValueError(f"unknown peer {name!r}; known here: none, {', '.join(others)}")
    return {name: function for name, function in functions.items() if name in OWN or name in peers}


def _sdpa_backend(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(backend):
        return attention(q, k, v, impl="sdpa")


def _without_extras(function: Callable, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out = function(q, k, v)
    return out[0] if isinstance(out, tuple) else out


def measure_implementations(
    shape: AttentionShape, functions: dict[str, AttentionFunction], options: BenchOptions, *, backward: bool = False
) -> MeasuredCase:
    """All implementations in turn on the same tensors; one that does not support them is kept with its reason."""
    dtype = getattr(torch, options.dtype)
    inputs = shape.tensors(dtype, options.device, grad=backward)
    expected = exact(*(x.detach() for x in inputs))
    rounding = relative_error(expected.to(dtype), expected)
    operations = 4 * shape.b * shape.i * shape.n * shape.m * shape.d * (3.5 if backward else 1)
    label = {"heads": shape.i, "queries": shape.n, "keys": shape.m, "width": shape.d}
    case = MeasuredCase(label | {"pass": "training" if backward else "forward"}, {}, operations)
    timers = {}
    with torch.set_grad_enabled(backward):
        for name, function in functions.items():
            result = case.results[name] = ContenderResult(own=name in OWN)
            try:
                result.distance = relative_error(function(*inputs).detach(), expected)
                run = partial(_forward_and_backward, function, inputs) if backward else partial(function, *inputs)
                timers[name] = timer(run, options.device)
            except Exception as error:  # whatever a library raises for a shape that it does not support
                result.failed = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
                continue
            if result.own:
                roundings = ALLOWED_ROUNDINGS if name in ROUND_ONCE else ALLOWED_ROUNDINGS * 2**0.5
                result.allowed = FLOAT32_ERROR if options.dtype == "float32" else roundings * rounding
            result.more = {"error / rounding": f"{result.distance / rounding:.2f}"}
        for i in range(options.pairs):
            for name in timers if i % 2 == 0 else reversed(timers):
                case.results[name].seconds.append(timers[name]())
    log(case, ", ".join(f"{name} {case.results[name].median * 1e6:.0f} µs" for name in timers))
    return case


def exact(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The result in float64."""
    chunks = (chunk.double() for chunk in q.split(1024, 1))
    return torch.cat([attention(chunk, k.double(), v.double(), impl="naive") for chunk in chunks], 1)


def _forward_and_backward(function: AttentionFunction, inputs: list[Tensor]) -> None:
    out = function(*inputs)
    torch.autograd.grad(out, inputs, torch.ones_like(out))


def timer(run: Callable[[], object], device: str) -> Callable[[], float]:
    """run, warmed up → a function that returns seconds per call, of a CUDA graph of many or of MIN_SECONDS of them."""
    if torch.device(device).type == "cuda":
        return _graph_timer(run)
    run()
    start = time.perf_counter()
    run()
    calls = max(1, round(MIN_SECONDS / max(time.perf_counter() - start, 1e-6)))

    def seconds() -> float:
        start = time.perf_counter()
        for _ in range(calls):
            run()
        return (time.perf_counter() - start) / calls

    return seconds


def _graph_timer(run: Callable[[], object]) -> Callable[[], float]:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            run()

    def seconds() -> float:
        times = []
        for _ in range(4):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) * 1e-3 / CALLS)
        return statistics.median(times[1:])

    return seconds
