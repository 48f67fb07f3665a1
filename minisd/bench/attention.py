"""`minisd bench attention`: every form of attention there is, in the shapes of Stable Diffusion, against float64."""

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
from minisd.bench.options import Options
from minisd.bench.pairs import FLOAT32_DISTANCE, Measured, Result, say
from minisd.bench.process import TURN
from minisd.bench.report import Report
from minisd.runtime.kernels import attention
from minisd.runtime.kernels.attention import IMPLEMENTATIONS

Form = Callable[[Tensor, Tensor, Tensor], Tensor]
OWN = ("minisd", *(name for name in IMPLEMENTATIONS if name != "sdpa"))  # "minisd" is what its networks run
ROUNDINGS = 1.5  # of the exact result to the dtype: what an own form may be off by …
ROUND_ONCE = (
    "naive",
    "sdpa32",
    "fused",
    "hopper",
)  # … and √2 times as much if it rounds the weights as well as the result
CALLS = 20  # captured into one CUDA graph


@dataclass(frozen=True)
class Shape:
    """queries 'b n i d', keys and values 'b m i d'."""

    b: int
    i: int
    n: int
    m: int
    d: int

    def tensors(self, dtype: torch.dtype, device: str, *, grad: bool = False) -> list[Tensor]:
        made = [torch.randn(self.b, tokens, self.i, self.d, device=device) for tokens in (self.n, self.m, self.m)]
        return [x.to(dtype).requires_grad_(grad) for x in made]


LEVELS = {  # heads, tokens, width of every attention of a network
    "sd1 512": [(8, 4096, 40), (8, 1024, 80), (8, 256, 160), (8, 64, 160)],
    "sd2 512": [(5, 4096, 64), (10, 1024, 64), (20, 256, 64), (20, 64, 64)],
    "sd2 768": [(5, 9216, 64), (10, 2304, 64), (20, 576, 64), (20, 144, 64)],
}
# self- and cross-attention of a guided picture, and the VAE's
SHAPES = [Shape(2, i, n, m, d) for levels in LEVELS.values() for i, n, d in levels for m in (n, 77)]
SHAPES.append(Shape(1, 1, 4096, 4096, 512))


def bench_attention(
    options: Options,
    *,
    training: bool = False,
    shapes: Iterable[Shape] = SHAPES,
    replaced: dict[str, Form] | None = None,
) -> Report:
    """Seconds and error of every form in every shape; also of forward and backward together, where training is set.

    A GPU's times are those of a CUDA graph of many calls. replaced: forms that stand in for those of the same name.
    """
    options.check()
    found = forms(options.peers) | (replaced or {})
    report = Report("attention", "softmax(q kᵀ · scale) v", machine(options.device), options)
    product = timer(matmul(options.dtype, options.device), options.device)
    peak = matmul_flop(options.device) / min(product() for _ in range(3))
    refused: dict[str, str] = {}
    for shape in shapes:
        for backward in (False, True) if training else (False,):
            case = measure_forms(shape, found, options, backward=backward)
            for name, result in list(case.results.items()):
                if result.failed:
                    refused.setdefault(name, result.failed)
                    del case.results[name]
            case.peak_flops = peak
            report.cases.append(case)
    if refused:
        report.notes.append("Left out where they cannot run: " + "; ".join(f"{k} ({v})" for k, v in refused.items()))
    return report


def forms(peers: tuple[str, ...] | None = None) -> dict[str, Form]:
    """What minisd's networks run, its forms by name, torch's own choice ("sdpa") and each of its backends alone,
    flash-attn's where they can be imported. peers: of those that are not minisd's, only these."""
    found: dict[str, Form] = {"minisd": attention}
    found |= {name: partial(attention, impl=name) for name in IMPLEMENTATIONS}
    for backend in (name for name in SDPBackend.__members__ if name.endswith(("ATTENTION", "MATH"))):
        found[f"sdpa:{backend.split('_')[0].lower()}"] = partial(_alone, SDPBackend.__members__[backend])
    for name, module in (("fa2", "flash_attn"), ("fa3", "flash_attn_interface"), ("fa4", "flash_attn.cute")):
        try:
            function = __import__(module, fromlist=["flash_attn_func"]).flash_attn_func
        except (ImportError, AttributeError):
            continue
        found[name] = partial(_first, function)
    if peers is None:
        return found
    others = [name for name in found if name not in OWN]
    for name in peers:
        if name not in (*others, "none"):
            raise ValueError(f"unknown peer {name!r}; known here: none, {', '.join(others)}")
    return {name: form for name, form in found.items() if name in OWN or name in peers}


def _alone(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(backend):
        return attention(q, k, v, impl="sdpa")


def _first(function: Callable, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out = function(q, k, v)
    return out[0] if isinstance(out, tuple) else out


def measure_forms(shape: Shape, found: dict[str, Form], options: Options, *, backward: bool = False) -> Measured:
    """All forms in turn on the same tensors. A form that does not take them is kept with its reason."""
    dtype = getattr(torch, options.dtype)
    inputs = shape.tensors(dtype, options.device, grad=backward)
    expected = exact(*(x.detach() for x in inputs))
    rounding = distance(expected.to(dtype), expected)
    operations = 4 * shape.b * shape.i * shape.n * shape.m * shape.d * (3.5 if backward else 1)
    label = {"heads": shape.i, "queries": shape.n, "keys": shape.m, "width": shape.d}
    case = Measured(label | {"pass": "training" if backward else "forward"}, {}, operations)
    timers = {}
    with torch.set_grad_enabled(backward):
        for name, form in found.items():
            result = case.results[name] = Result(own=name in OWN)
            try:
                result.distance = distance(form(*inputs).detach(), expected)
                run = partial(_training, form, inputs) if backward else partial(form, *inputs)
                timers[name] = timer(run, options.device)
            except Exception as error:  # a form that does not take this shape is no reason to stop
                result.failed = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
                continue
            if result.own:
                roundings = ROUNDINGS if name in ROUND_ONCE else ROUNDINGS * 2**0.5
                result.allowed = FLOAT32_DISTANCE if options.dtype == "float32" else roundings * rounding
            result.more = {"off by, in roundings": f"{result.distance / rounding:.2f}"}
        for i in range(options.pairs):
            for name in timers if i % 2 == 0 else reversed(timers):
                case.results[name].seconds.append(timers[name]())
    say(case, ", ".join(f"{name} {case.results[name].median * 1e6:.0f} µs" for name in timers))
    return case


def exact(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The result in float64."""
    parts = (part.double() for part in q.split(1024, 1))
    return torch.cat([attention(part, k.double(), v.double(), impl="naive") for part in parts], 1)


def distance(x: Tensor, y: Tensor) -> float:
    """‖x - y‖ / ‖y‖."""
    return ((x.double() - y).norm() / y.norm()).item()


def _training(form: Form, inputs: list[Tensor]) -> None:
    out = form(*inputs)
    torch.autograd.grad(out, inputs, torch.ones_like(out))


def timer(run: Callable[[], object], device: str) -> Callable[[], float]:
    """run, warmed up → a function that gives seconds a call: of a CUDA graph of many, or of as many as fill a turn."""
    if torch.device(device).type == "cuda":
        return _graph_timer(run)
    run()
    start = time.perf_counter()
    run()
    calls = max(1, round(TURN / max(time.perf_counter() - start, 1e-6)))

    def turn() -> float:
        start = time.perf_counter()
        for _ in range(calls):
            run()
        return (time.perf_counter() - start) / calls

    return turn


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

    def turn() -> float:
        times = []
        for _ in range(4):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) * 1e-3 / CALLS)
        return statistics.median(times[1:])

    return turn
