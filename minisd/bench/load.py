"""`minisd bench load`: a checkpoint of the official size read from one file, beside diffusers' loader."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn

from minisd.bench.machine import machine
from minisd.bench.options import BenchOptions
from minisd.bench.pairs import ContenderResult, MeasuredCase, failure, log
from minisd.bench.peers import select
from minisd.bench.process import WorkerError, in_fresh_process, resident
from minisd.bench.report import BenchReport
from minisd.bench.weights import random_state
from minisd.checkpoints.building import on_meta
from minisd.checkpoints.diffusers_write import folder_files
from minisd.checkpoints.files import save_safetensors
from minisd.checkpoints.save import ldm_tensors
from minisd.config import PRESETS, SD1, ModelConfig


@dataclass(frozen=True)
class CheckpointFile:
    """A single-file checkpoint in the original layout, and how it is loaded.

    dtype: of the loaded weights. configs: a folder of diffusers' config files, which it would otherwise download.
    config: for minisd, where the shapes do not tell it, as those of all official models do.
    """

    path: Path
    dtype: str
    device: str
    configs: Path
    config: ModelConfig | None = None


# A contender imports what it needs and returns the function that is measured, which returns the networks.
def minisd(file: CheckpointFile) -> Callable[[], list[nn.Module]]:
    from minisd.stable_diffusion import load

    def run() -> list[nn.Module]:
        sd = load(file.path, config=file.config, dtype=getattr(torch, file.dtype), device=file.device)
        return [sd.unet, sd.vae, sd.text_encoder]

    return run


def diffusers(file: CheckpointFile) -> Callable[[], list[nn.Module]]:
    from diffusers import StableDiffusionPipeline

    def run() -> list[nn.Module]:
        options = {"config": str(file.configs), "local_files_only": True}
        if file.dtype != "float32":  # the default; asked for explicitly, it casts once more
            options["torch_dtype"] = getattr(torch, file.dtype)
        pipeline = StableDiffusionPipeline.from_single_file(str(file.path), **options)
        if file.device != "cpu":
            pipeline.to(file.device)
        return [pipeline.unet, pipeline.vae, pipeline.text_encoder]

    return run


CONTENDERS = {"minisd": minisd, "diffusers": diffusers}


def bench_load(options: BenchOptions, config: ModelConfig = SD1) -> BenchReport:
    """Time and memory of loading a file of random weights in the dtype of the options.

    float16 is loaded as float32 on a CPU. Before every run the file is read once, so that the page cache is warm and
    the disk is not measured; imports are not timed. A file whose dtype is kept is memory-mapped, so that loading reads
    nothing: the time until every weight has been used stands beside it, and peaks are taken after that.
    """
    options.check()
    contenders = select(CONTENDERS, options.peers)
    dtype = "float32" if options.dtype == "float16" and options.device == "cpu" else options.dtype
    with tempfile.TemporaryDirectory(prefix="minisd-bench-") as path:
        folder = Path(path)
        unofficial = None if config in PRESETS.values() else config
        file = CheckpointFile(folder / "model.safetensors", dtype, options.device, folder / "configs", unofficial)
        write_random_file(file.path, file.configs, config, options.dtype)
        size = file.path.stat().st_size
        measured = MeasuredCase({"file": options.dtype}, {name: ContenderResult() for name in contenders})
        runs: dict[str, list[dict[str, float]]] = {name: [] for name in contenders}
        read_seconds, touch_seconds = [], []
        for i in range(options.pairs):
            for name in contenders if i % 2 == 0 else reversed(contenders):
                read_seconds.append(read_through(file.path))
                try:
                    runs[name].append(in_fresh_process(partial(measure_load, contenders[name], file)))
                except WorkerError as error:
                    if name == "minisd":
                        raise
                    measured.results[name] = failure(measured, name, error)
            kept = runs["minisd"][-1]["kept"]
            touch_seconds.append(in_fresh_process(partial(touch, int(kept))))
            times = ", ".join(f"{name} {taken[-1]['load']:.3g} s" for name, taken in runs.items() if taken)
            log(measured, f"pair {i + 1} of {options.pairs}: {times}")
    for name, taken in runs.items():
        if not measured.results[name].failed:
            measured.results[name] = _result(taken)
    what = f"{config.name}, {size / 1e9:.2f} GB of {options.dtype} in one file, loaded as {dtype}"
    note = (
        f"Lower bounds: reading the file from the page cache into a buffer {min(read_seconds):.2f} s; "
        f"writing {kept / 1e9:.2f} GB of new memory once, as converted weights must be, {min(touch_seconds):.2f} s."
    )
    return BenchReport("load", what, machine(options.device), options, [measured], [note])


def _result(taken: list[dict[str, float]]) -> ContenderResult:
    result = ContenderResult([run["load"] for run in taken], max(run["peak"] for run in taken))
    best = {name: min(run[name] for run in taken) for name in taken[0]}
    result.more = {
        "fastest": round(best["load"], 3),
        "fastest, every weight used": round(best["use"], 3),
        "kept (GB)": round(best["kept"] / 1e9, 2),
        "peak / kept": round(result.peak / best["kept"], 2),
    }
    return result


def write_random_file(path: Path, configs: Path, config: ModelConfig, dtype: str) -> None:
    """A checkpoint of the original's names and shapes, and a diffusers folder of its config files without weights."""
    tensors = {}
    for name in ("unet", "vae", "text"):
        network = on_meta(name, getattr(config, name))
        state = {ours: tensor.to(getattr(torch, dtype)) for ours, tensor in random_state(network).items()}
        network.load_state_dict(state, assign=True)
        tensors |= ldm_tensors(name, network)
    save_safetensors(path, tensors)
    for name, text in folder_files(config).items():
        (configs / name).parent.mkdir(parents=True, exist_ok=True)
        (configs / name).write_text(text, encoding="utf-8")


def read_through(path: Path) -> float:
    """Seconds to read a file from the page cache into one buffer; it is in there afterwards."""
    buffer = memoryview(bytearray(16 << 20))
    for _ in range(2):
        start = time.perf_counter()
        with open(path, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return time.perf_counter() - start


def touch(nbytes: int) -> float:
    """Seconds to write to so much new memory once: what the system takes to hand it out."""
    start = time.perf_counter()
    torch.empty(nbytes, dtype=torch.uint8).fill_(1)
    return time.perf_counter() - start


def measure_load(
    contender: Callable[[CheckpointFile], Callable[[], list[nn.Module]]], file: CheckpointFile
) -> dict[str, float]:
    """Seconds until the networks are loaded and until every weight was used; bytes kept, and peak, of this process."""
    load = contender(file)
    before = resident()  # imports do not count
    start = time.perf_counter()
    networks = load()
    loaded = time.perf_counter()
    kept = 0
    for network in networks:
        for tensor in network.state_dict().values():
            tensor.sum()
            kept += tensor.numel() * tensor.element_size()
    used = time.perf_counter()
    return {"load": loaded - start, "use": used - start, "peak": resident(peak=True) - before, "kept": kept}
