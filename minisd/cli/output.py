"""Where pictures go: their names, the sheets beside them, and what is seen while they are made."""

from __future__ import annotations

import os
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Group, Parameter

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from PIL import Image

    from minisd.diffusion.samplers import Step
    from minisd.tasks.sampling import Sampling


@Parameter(name="*", group=Group("Output", sort_key=3))
@dataclass(frozen=True)
class Output:
    """Where images go.

    Attributes:
        out: .png file (numbered where there are several images) or folder; nothing is overwritten
        overwrite: replace files of the same name
        grid: also save a grid of all images, as this .png file
        trajectory: also save the predicted x_0 of the first image at about ten steps, as this .png file
        preview: keep this .png file showing the predicted image while sampling, refreshed every few seconds
    """

    out: Annotated[Path, Parameter(alias="-o")] = Path("outputs")
    overwrite: bool = False
    grid: Path | None = None
    trajectory: Path | None = None
    preview: Path | None = None

    @property
    def folder(self) -> Path:
        """Where the pictures will lie."""
        return self.out.parent if self._is_picture else self.out

    @property
    def _is_picture(self) -> bool:
        return self.out.suffix.lower() == ".png" and not self.out.is_dir()

    def names(self, total: int, seed: int) -> list[Path]:
        """A file name for each picture. ValueError where one exists, or cannot be written."""
        if self._is_picture:
            width = len(str(total - 1))
            numbered = [self.out.with_name(f"{self.out.stem}-{i:0{width}}{self.out.suffix}") for i in range(total)]
            names = [self.out] if total == 1 else numbered
        elif self.out.suffix.lower() in (".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"):
            raise ValueError(f"{self.out}: pictures are saved as .png, which holds how they were made: name it so")
        else:
            taken = [int(n) for path in self.out.glob("*.png") if (n := path.stem.partition("-")[0]).isdecimal()]
            first = max(taken, default=-1) + 1
            names = [self.out / f"{first + i:05}-{seed + i}.png" for i in range(total)]
        sheets = [path for path in (self.grid, self.trajectory) if path is not None]
        for path in [*sheets, *([self.preview] if self.preview else [])]:
            if path.suffix.lower() != ".png":
                raise ValueError(f"{path}: sheets and previews are saved as .png: name it so")
        if len({path.absolute() for path in [*names, *sheets]}) < len(names) + len(sheets):
            raise ValueError("two of --out, --grid and --trajectory name the same file: give each its own")
        for path in [*names, *sheets]:
            check_target(path, overwrite=self.overwrite)
        return names


def check_target(path: Path, *, overwrite: bool | None = False) -> None:
    """ValueError where a file cannot be written, or exists already; overwrite None is False, with no option for it."""
    if path.is_dir():
        raise ValueError(f"{path} is a folder: give the name of a file")
    if path.exists() and not overwrite:
        hint = "" if overwrite is None else ", or add --overwrite"
        raise ValueError(f"{path} exists already: choose another name{hint}")
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise ValueError(f"{path} cannot be written, {folder} is no folder that one may write to: choose another name")


def progress(sampling: Sampling) -> Iterator[Step]:
    """The steps of a sampling, under a bar with seconds per step."""
    from tqdm import tqdm

    label = f"seed {sampling.seeds[0]}" + (f"…{sampling.seeds[-1]}" if len(sampling.seeds) > 1 else "")
    label += " (first pass)" if sampling.is_draft else ""
    form = "{desc} {bar:24} {n_fmt}/{total_fmt} {elapsed}<{remaining}, {rate_inv_fmt}"
    return tqdm(sampling, total=len(sampling), desc=label, unit="step", bar_format=form)


class Preview:
    """A file that shows what is coming: from a while into the run on, and for at most a fifth of the time."""

    def __init__(self, path: Path | None, *, pause: float = 2.0):
        self.path, self.pause = path, pause
        self.due = time.monotonic() + pause

    def show(self, sampling: Sampling, step: Step) -> None:
        if self.path is None or (start := time.monotonic()) < self.due:
            return
        try:
            save_sheet(self.path, sampling.preview(step))
        except OSError as error:  # on Windows, say, while a viewer holds it open: no reason to lose the run
            warnings.warn(f"no preview was written ({error})", stacklevel=2)
        self.due = time.monotonic() + max(self.pause, 4 * (time.monotonic() - start))


class Strip:
    """About ten frames of a sampling, evenly spread, the last among them."""

    def __init__(self, frames: int = 10):
        self.frames, self.images = frames, []

    def add(self, sampling: Sampling, number: int, step: Step) -> None:
        """Keep step `number` of the sampling if it is one of those to show."""
        total = len(sampling)
        if total <= self.frames or (number + 1) * self.frames // total > number * self.frames // total:
            self.images.append(sampling.preview(step)[0])


def save_sheet(path: Path, images: Sequence[Image.Image], columns: int | None = None) -> None:
    """All pictures on one, about square unless columns are given."""
    from minisd.files import write_whole
    from minisd.tasks.images import grid

    sheet = grid(images, columns)
    write_whole(path, lambda file: sheet.save(file, "PNG"))
