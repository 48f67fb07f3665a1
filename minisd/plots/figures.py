"""What the plots share: figures without pyplot, strips without resampling, files written atomically."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from minisd.files import write_whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from PIL.Image import Image

PathLike = str | os.PathLike[str]

FORMATS = (".png", ".pdf", ".svg")
SMALL, LARGE = 9, 11  # points
DPI = 200
PANEL = 256  # pixels of the longer side of an image in a strip; small ones are enlarged by a whole factor up to that


def new_figure(width: float, height: float, layout: str | None = None) -> Figure:
    """An empty figure of width × height inches, without pyplot, which would keep it alive and choose a backend."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'minisd[plot]'") from error
    figure = Figure((width, height), dpi=DPI, layout=layout, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def strip(
    rows: int,
    columns: int,
    size: tuple[int, int],
    *,
    captions: bool = False,
    titles_in_every_row: bool = False,
    row_titles: Sequence[str] = (),
) -> tuple[Figure, list[list[Axes]]]:
    """A figure of rows × columns panels for images of this (width, height), at one pixel of the PNG per pixel.

    captions: leave room below every image; titles_in_every_row: above every image, otherwise above the first row.
    """
    width, height = size
    gap, title, caption = 12, 48, 44 * captions
    left = max((17 * len(text) + gap for text in row_titles), default=0)
    cell = max(width, 250 if titles_in_every_row else 190)  # the longest word, the longest caption
    pitch = height + caption + gap + title * titles_in_every_row
    total = left + gap + columns * (cell + gap), rows * pitch + title * (not titles_in_every_row)
    figure = new_figure(total[0] / DPI, total[1] / DPI)
    panels = []
    for row in range(rows):
        bottom = total[1] - title - row * pitch - height
        lefts = [left + gap + column * (cell + gap) + (cell - width) // 2 for column in range(columns)]
        boxes = [(x / total[0], bottom / total[1], width / total[0], height / total[1]) for x in lefts]
        panels.append([figure.add_axes(box, xticks=[], yticks=[], frame_on=False) for box in boxes])
    for row, text in zip(panels, row_titles, strict=False):
        row[0].set_ylabel(text, fontsize=LARGE, rotation=0, ha="right", va="center", parse_math=False)
    return figure, panels


def save(figure: Figure, out: PathLike) -> Path:
    """Write beside, then rename: an old figure survives every failure."""
    out = Path(out)
    if out.suffix.lower() not in FORMATS:
        raise ValueError(f"cannot write a plot to {str(out)!r}: end the name in {', '.join(FORMATS)}")
    if not out.parent.is_dir():
        raise ValueError(f"there is no folder {str(out.parent)!r} to write {out.name!r} to: make it first")
    write_whole(out, lambda file: figure.savefig(file, format=out.suffix[1:].lower(), dpi="figure"))
    return out


def reduced(image: Image, side: int) -> Image:
    """The image in RGB, its longer side at most `side`."""
    from PIL import Image as pil

    from minisd.tasks.images import to_pil, to_tensor, to_uint8

    image = to_pil(to_uint8(to_tensor(image)))[0]
    image.thumbnail((side, side), pil.Resampling.LANCZOS)
    return image


def as_panel(image: Image) -> Image:
    """The image in RGB at the size of a panel: reduced, or enlarged by a whole factor."""
    from PIL import Image as pil

    image = reduced(image, PANEL)
    zoom = PANEL // max(image.size)
    return image.resize((zoom * image.width, zoom * image.height), pil.Resampling.NEAREST)
