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
from minisd.bench.options import Options
from minisd.bench.pairs import Measured, Result, say
from minisd.bench.peers import chosen
from minisd.bench.process import Failed, alone, resident
from minisd.bench.report import Report
from minisd.bench.weights import random_state
from minisd.checkpoints.building import on_meta
from minisd.checkpoints.diffusers_write import folder_files
from minisd.checkpoints.files import save_safetensors
from minisd.checkpoints.save import ldm_tensors
from minisd.config import PRESETS, SD1, ModelConfig


@dataclass(frozen=True)
class File:
    """A single file in the original layout.

    dtype: that the weights are loaded as. configs: a folder of diffusers' configs, which it wants instead of a look-up.
    config: for minisd, where no shapes tell it, as they do for all official models.
    """

    path: Path
    dtype: str
    device: str
    configs: Path
    config: ModelConfig | None = None


# A contender imports what it needs and gives the function that is measured, which gives the networks.
def minisd(file: File) -> Callable[[], list[nn.Module]]:
    from minisd.stable_diffusion import load

    def run() -> list[nn.Module]:
        sd = load(file.path, config=file.config, dtype=getattr(torch, file.dtype), device=file.device)
        return [sd.unet, sd.vae, sd.text_encoder]

    return run


def diffusers(file: File) -> Callable[[], list[nn.Module]]:
    from diffusers import StableDiffusionPipeline

    def run() -> list[nn.Module]:
        options = {"config": str(file.configs), "local_files_only": True}
        if file.dtype != "float32":  # its default; told so, it casts once more
            options["torch_dtype"] = getattr(torch, file.dtype)
        pipeline = StableDiffusionPipeline.from_single_file(str(file.path), **options)
        if file.device != "cpu":
            pipeline.to(file.device)
        return [pipeline.unet, pipeline.vae, pipeline.text_encoder]

    return run


CONTENDERS = {"minisd": minisd, "diffusers": diffusers}


def bench_load(options: Options, config: ModelConfig = SD1) -> Report:
    """Time and memory of loading a file of random weights in the dtype of the options.

    float16 is loaded as float32 on a CPU. Before every run the file is read once: the page cache is warm, and the
    figures are those of the program, not of the disk. Imports are not timed. A file whose dtype is kept is mapped, so
    that loading reads nothing: the time until every weight has been used stands beside it. Peaks are taken after that.
    """
    options.check()
    programs = chosen(CONTENDERS, options.peers)
    dtype = "float32" if options.dtype == "float16" and options.device == "cpu" else options.dtype
    with tempfile.TemporaryDirectory(prefix="minisd-bench-") as place:
        unofficial = None if config in PRESETS.values() else config
        file = File(Path(place, "model.safetensors"), dtype, options.device, Path(place, "configs"), unofficial)
        write_random_file(file.path, file.configs, config, options.dtype)
        size = file.path.stat().st_size
        found = Measured({"file": options.dtype}, {name: Result() for name in programs})
        runs: dict[str, list[dict[str, float]]] = {name: [] for name in programs}
        reading, touching = [], []
        for i in range(options.pairs):
            for name in programs if i % 2 == 0 else reversed(programs):
                reading.append(read_through(file.path))
                try:
                    runs[name].append(alone(partial(measure_load, programs[name], file)))
                except Failed as error:
                    if name == "minisd":
                        raise
                    found.results[name].failed = str(error)
            kept = runs["minisd"][-1]["kept"]
            touching.append(alone(partial(touch, int(kept))))
            times = ", ".join(f"{name} {taken[-1]['load']:.3g} s" for name, taken in runs.items() if taken)
            say(found, f"pair {i + 1} of {options.pairs}: {times}")
    for name, taken in runs.items():
        if not found.results[name].failed:
            found.results[name] = _result(taken)
    what = f"{config.name}, {size / 1e9:.2f} GB of {options.dtype} in one file, loaded as {dtype}"
    note = (
        f"Alone, at best: reading the file from the page cache into a buffer {min(reading):.2f} s; "
        f"writing {kept / 1e9:.2f} GB of new memory once, which converted weights need, {min(touching):.2f} s."
    )
    return Report("load", what, machine(options.device), options, [found], [note])


def _result(taken: list[dict[str, float]]) -> Result:
    result = Result([run["load"] for run in taken], max(run["peak"] for run in taken))
    best = {name: min(run[name] for run in taken) for name in taken[0]}
    result.more = {
        "quickest": round(best["load"], 3),
        "quickest, every weight used": round(best["use"], 3),
        "kept (GB)": round(best["kept"] / 1e9, 2),
        "peak / kept": round(result.peak / best["kept"], 2),
    }
    return result


def write_random_file(path: Path, configs: Path, config: ModelConfig, dtype: str) -> None:
    """A file of the original's names and shapes, and a diffusers folder of its configs without weights."""
    tensors = {}
    for name in ("unet", "vae", "text"):
        network = on_meta(name, getattr(config, name))
        state = {ours: tensor.to(getattr(torch, dtype)) for ours, tensor in random_state(network).items()}
        network.load_state_dict(state, assign=True)
        tensors |= ldm_tensors(name, network)
    save_safetensors(path, tensors)
    for place, text in folder_files(config).items():
        (configs / place).parent.mkdir(parents=True, exist_ok=True)
        (configs / place).write_text(text, encoding="utf-8")


def read_through(path: Path) -> float:
    """Seconds to read a file into one buffer, after having read it: afterwards it is in the page cache."""
    buffer = memoryview(bytearray(16 << 20))
    for _ in range(2):
        start = time.perf_counter()
        with open(path, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return time.perf_counter() - start


def touch(nbytes: int) -> float:
    """Seconds until so much new memory has been written to: what the system takes to hand it out."""
    start = time.perf_counter()
    torch.empty(nbytes, dtype=torch.uint8).fill_(1)
    return time.perf_counter() - start


def measure_load(program: Callable[[File], Callable[[], list[nn.Module]]], file: File) -> dict[str, float]:
    """Seconds until the networks are there and until every weight was used; bytes kept and at most, in this process."""
    load = program(file)
    before = resident()  # imports are no part of it
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
