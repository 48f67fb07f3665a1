"""What one sees of a training: a bar, a log of JSON lines, a picture of the curves, sheets of samples."""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from minisd.files import write_whole


class Progress:
    """The log of one training in its folder: log.jsonl, curves.png, samples-0001000.png …

    Each line of the log has the step, the means of all values since the line before, and the seconds and samples per
    second of this sitting. A resumed training goes on after the line of the step where it starts. write: whether this
    process writes the files; bar: whether it shows how far it is; tensorboard: whether that gets the same.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        start: int,
        steps: int,
        batch_size: int,
        *,
        bar: bool,
        write: bool,
        tensorboard: bool = False,
    ):
        self.folder, self.batch_size = folder, batch_size
        self.lines = [line for line in read_log(folder / "log.jsonl") if line["step"] <= start]
        if write:
            text = "".join(json.dumps(line) + "\n" for line in self.lines)
            write_whole(folder / "log.jsonl", lambda file: file.write(text.encode()))
        self._values: list[Mapping[str, Tensor]] = []
        self._keeps = write
        self._board = summary_writer(folder, start) if tensorboard and write else None
        self._began = self._last = time.monotonic()
        self._bar = tqdm(total=steps, initial=start, desc=name, unit="step", disable=not bar, dynamic_ncols=True)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._bar.close()
        if self._board is not None:
            self._board.close()

    def step(self, values: Mapping[str, Tensor]) -> None:
        """Count a step and remember its values, scalars on any device."""
        self._bar.update()
        if self._keeps:  # nobody else would ever clear them
            self._values.append(values)

    def log(self, step: int, **more: float) -> None:
        """Write a line: the means since the one before, and `more` as it is."""
        if not self._values:
            return
        now, n = time.monotonic(), len(self._values)
        names = list(self._values[-1])
        means = {k: torch.stack([v[k].float().cpu() for v in self._values if k in v]).mean().item() for k in names}
        speed = n * self.batch_size / max(now - self._last, 1e-9)
        times = {"seconds": round(now - self._began, 3), "samples_per_second": round(speed, 3)}
        self.lines.append({"step": step, **means, **more, **times})
        with open(self.folder / "log.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(self.lines[-1]) + "\n")
        if self._board is not None:
            for key, value in {**means, **more}.items():
                self._board.add_scalar(key, value, step)
        self._bar.set_postfix_str(f"loss {means.get('loss', float('nan')):.4g}")
        self._values, self._last = [], now

    def draw(self, step: int, sheet: Image.Image | None) -> None:
        """Renew the curves, and keep a sheet of samples under its step."""
        draw_curves(self.lines, self.folder / "curves.png")
        if sheet is not None:
            write_whole(self.folder / f"samples-{step:07d}.png", lambda file: sheet.save(file, "PNG"))
            if self._board is not None:
                self._board.add_image("samples", np.asarray(sheet.convert("RGB")), step, dataformats="HWC")


def summary_writer(folder: Path, start: int):
    """TensorBoard's, which forgets what an earlier sitting wrote from `start` on."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ImportError("TensorBoard is not installed: pip install 'minisd[tensorboard]'") from None
    return SummaryWriter(folder / "tensorboard", purge_step=start + 1)


def read_log(path: Path) -> list[dict]:
    """The whole lines of a log; none where there is no file. A line that a crash cut short is left out."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1] if line]


def draw_curves(lines: Sequence[Mapping[str, float]], path: Path) -> None:
    """Every value of the log against the step, one panel each. Needs matplotlib; says so where it is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        warnings.warn("no curves are drawn: they need matplotlib (pip install 'minisd[plot]')", stacklevel=2)
        return
    names = [name for name in (lines[-1] if lines else ()) if name not in ("step", "seconds", "samples_per_second")]
    if not names:
        return
    columns = min(4, len(names))
    rows = -(-len(names) // columns)
    figure = Figure((4 * columns, 2.5 * rows), dpi=100, layout="constrained")
    for i, name in enumerate(names):
        axes = figure.add_subplot(rows, columns, i + 1)
        points = [(line["step"], line[name]) for line in lines if name in line]
        axes.plot(*zip(*points, strict=True), linewidth=1)
        axes.set_title(name, loc="left", fontsize=9)
        axes.set_xlabel("step", fontsize=8)
        axes.tick_params(which="both", labelsize=8)
        if name in ("loss", "gradient") and min(value for _, value in points) > 0:
            axes.set_yscale("log")
    write_whole(path, lambda file: figure.savefig(file, format="png"))
