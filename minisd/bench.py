"""Measurements of minisd, beside its peers where they are installed.

Every load is measured in a process of its own, so that its peak of memory is its own.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Literal

GB = 1e9


# ----------------------------------------------------------------------------------------------------------- loading


def bench_load(*, dtype: Literal["float32", "float16"] = "float32", runs: int = 3) -> list[dict]:
    """Time and memory of loading an SD1 single file of the official size (4.27 GB in float32), as a Markdown table.

    dtype: of the weights in the file; both libraries load them as float32. The file, of random weights, and the local
    configs that diffusers wants instead of a look-up are made in the temporary folder and removed. Before every run
    the file is read once: the page cache is warm, and the figures are those of the program, not of the disk. Imports
    are not timed. Peaks are counted above the resident size after `import torch`, once every weight has been used.
    Of the runs the best time counts, which the machine's other work disturbed least, and the highest peak. A file whose
    dtype is kept is mapped: loading it reads nothing, which is why the time until every weight has been used stands
    beside it. Returns the rows.
    """
    with tempfile.TemporaryDirectory(prefix="minisd-bench-") as place:
        path = Path(place, "sd1.safetensors")
        write_random_sd1(path, Path(place, "configs"), dtype)
        loaders = ["minisd", *(["diffusers"] if importlib.util.find_spec("diffusers") else [])]
        found: dict[str, list[dict]] = {name: [] for name in loaders}
        reading = []
        for _ in range(runs):
            for name in loaders:
                reading.append(read_through(path))
                found[name].append(in_own_process(name, path))
        size = path.stat().st_size
    rows = [_row(name, measured) for name, measured in found.items()]
    print(f"SD1, {size / GB:.2f} GB of {dtype} in one file, loaded as float32; {os.cpu_count()} CPUs, best of {runs}")
    print(f"reading the file from the page cache into a buffer, alone: {min(reading):.2f} s\n")
    print(markdown(rows))
    return rows


def write_random_sd1(path: Path, configs: Path, dtype: str) -> None:
    """A file of SD1's names and shapes, and a diffusers folder of SD1's configs without weights."""
    import torch

    from minisd.checkpoints.building import on_meta
    from minisd.checkpoints.diffusers_write import folder_files
    from minisd.checkpoints.files import save_safetensors
    from minisd.checkpoints.save import ldm_tensors
    from minisd.config import SD1

    names = {}
    for name in ("unet", "vae", "text"):
        names |= ldm_tensors(name, on_meta(name, getattr(SD1, name)))
    # one draw that all tensors are views of: as random to a loader, and made in no time
    draw = (torch.randn(max(tensor.numel() for tensor in names.values())) * 0.02).to(getattr(torch, dtype))
    save_safetensors(path, {name: draw[: tensor.numel()].view(tensor.shape) for name, tensor in names.items()})
    for place, text in folder_files(SD1).items():
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


def in_own_process(library: str, path: Path) -> dict[str, float]:
    """What `measure_load` prints, from a fresh process: seconds and bytes."""
    code = f"from minisd.bench import measure_load; measure_load({library!r}, {str(path)!r})"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"loading with {library} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def measure_load(library: str, path: str) -> None:
    """Load with one library and print what it took, as JSON; the process must be fresh."""
    import torch

    warnings.simplefilter("ignore")
    torch.set_grad_enabled(False)
    before = resident()
    load = _LOADERS[library](Path(path))
    start = time.perf_counter()
    networks = load()
    loaded = time.perf_counter()
    kept = 0
    for network in networks:
        for tensor in network.state_dict().values():
            tensor.sum()
            kept += tensor.numel() * tensor.element_size()
    used = time.perf_counter()
    print(json.dumps({"load": loaded - start, "use": used - start, "peak": resident(peak=True) - before, "kept": kept}))


def _minisd(path: Path) -> Callable[[], list]:
    import minisd

    minisd.load  # noqa: B018 - imports what loading needs
    return lambda: [(sd := minisd.load(path)).unet, sd.vae, sd.text_encoder]


def _diffusers(path: Path) -> Callable[[], list]:
    from diffusers import StableDiffusionPipeline

    def load() -> list:
        options = {"config": str(path.parent / "configs"), "local_files_only": True}
        pipeline = StableDiffusionPipeline.from_single_file(str(path), **options)
        return [pipeline.unet, pipeline.vae, pipeline.text_encoder]

    return load


_LOADERS = {"minisd": _minisd, "diffusers": _diffusers}


def resident(*, peak: bool = False) -> int:
    """Bytes of this process in memory, now or at most, mapped files included (Linux; the peak alone elsewhere)."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    name = "VmHWM:" if peak else "VmRSS:"
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith(name)) * 1024


def _row(name: str, measured: list[dict]) -> dict:
    best = {key: min(run[key] for run in measured) for key in measured[0]}
    return {
        "": name,
        "load (s)": round(best["load"], 2),
        "load, then use every weight (s)": round(best["use"], 2),
        "kept (GB)": round(best["kept"] / GB, 2),
        "peak (GB)": round(max(run["peak"] for run in measured) / GB, 2),
        "peak / kept": round(max(run["peak"] / run["kept"] for run in measured), 2),
    }


def markdown(rows: list[Mapping[str, object]]) -> str:
    """Rows of equal keys as a Markdown table."""

    def lines() -> Iterator[str]:
        yield "| " + " | ".join(rows[0]) + " |"
        yield "|" + "---|" * len(rows[0])
        for row in rows:
            yield "| " + " | ".join(str(value) for value in row.values()) + " |"

    return "\n".join(lines())
