"""Pictures for scripts/build_emoji.py: SVG → RGBA, the subjects' views, the contact sheet."""

from __future__ import annotations

import colorsys
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

SVG = (
    '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" width="{size}" height="{size}" '
    'viewBox="{left} {top} {width} {height}"><g transform="{transform}">{body}</g></svg>'
)


@dataclass(frozen=True)
class Drawing:
    """One emoji as it stands in its package: the inside of an <svg>, and its view box."""

    name: str
    body: str
    left: float
    top: float
    width: float
    height: float


@dataclass(frozen=True)
class View:
    """How a subject is shown. angle: degrees, clockwise; scale: the drawing's square against the picture's; place: of
    the drawing in the room that is left, from -1 (left, top) to 1; hue: of the background, in turns."""

    angle: float
    scale: float
    place: tuple[float, float]
    background: str
    hue: float = 0.0


# No angle, scale or background colour of a training view comes back in a test view.
VIEWS = {
    "train": (
        View(0, 0.90, (0, 0), "white"),
        View(-20, 0.64, (-0.9, 0.6), "plain", 0.00),
        View(14, 0.70, (0.8, 0.9), "horizon", 0.30),
        View(32, 0.58, (0.3, -0.9), "gradient", 0.55),
        View(-38, 0.50, (0.7, 0.2), "checks", 0.80),
    ),
    "test": (
        View(8, 0.80, (-0.5, 0.5), "grey"),
        View(-12, 0.66, (0.9, 0.8), "gradient", 0.15),
        View(24, 0.56, (-0.8, -0.3), "horizon", 0.70),
        View(-28, 0.60, (0.1, 0.9), "plain", 0.45),
    ),
}


def rasterise(drawing: Drawing, size: int, view: View | None = None) -> np.ndarray:
    """A square picture, uint8 'h w c', straight RGBA. The view turns, shrinks and moves the vectors, not the pixels."""
    import resvg_py

    transform = "" if view is None else _transform(drawing, view)
    box = dict(left=drawing.left, top=drawing.top, width=drawing.width, height=drawing.height)
    svg = SVG.format(size=size, transform=transform, body=drawing.body, **box)
    try:
        png = resvg_py.svg_to_bytes(svg_string=svg, skip_system_fonts=True)
    except ValueError as error:
        raise ValueError(f"the drawing {drawing.name} does not rasterise ({error}): is its package damaged?") from error
    picture = np.asarray(Image.open(io.BytesIO(png)).convert("RGBA"))
    if not (picture[..., 3] >= 128).any():
        raise ValueError(f"the drawing {drawing.name} comes out empty: is its package damaged?")
    return picture


def _transform(drawing: Drawing, view: View) -> str:
    turn = math.radians(view.angle)
    room = (1 - view.scale * (abs(math.cos(turn)) + abs(math.sin(turn)))) / 2  # the turned square stays inside
    side = max(drawing.width, drawing.height)
    centre_x, centre_y = drawing.left + drawing.width / 2, drawing.top + drawing.height / 2
    x, y = (centre + place * room * side for centre, place in zip((centre_x, centre_y), view.place, strict=True))
    return f"translate({x:.4f} {y:.4f}) rotate({view.angle}) scale({view.scale}) translate({-centre_x} {-centre_y})"


def write_subject(folder: Path, drawing: Drawing, others: dict[str, Drawing], size: int, hue: float) -> None:
    """folder/{train,test}/*.png, and their masks (white where the drawing is, from its alpha) in folder/masks/.

    others: the same concept by style, written over white to folder/other/STYLE.png.
    """
    for part, views in VIEWS.items():
        for sub in (folder / part, folder / "masks" / part):
            sub.mkdir(parents=True, exist_ok=True)
        for n, view in enumerate(views):
            picture = rasterise(drawing, size, view)
            name = f"{n:02d}.png"
            _over(picture, background(view, size, hue)).save(folder / part / name, optimize=True)
            mask = Image.fromarray(np.where(picture[..., 3] >= 128, 255, 0).astype(np.uint8))
            mask.save(folder / "masks" / part / name, optimize=True)
    (folder / "other").mkdir(exist_ok=True)
    for style, other in others.items():
        picture = rasterise(other, size, VIEWS["train"][0])
        _over(picture, background(VIEWS["train"][0], size, hue)).save(folder / "other" / f"{style}.png", optimize=True)


def _over(picture: np.ndarray, ground: np.ndarray) -> Image.Image:
    alpha = picture[..., 3:].astype(int)
    return Image.fromarray(
        ((picture[..., :3] * alpha + ground.astype(int) * (255 - alpha) + 127) // 255).astype(np.uint8)
    )


def background(view: View, size: int, hue: float) -> np.ndarray:
    """uint8 'h w c': white, grey, one plain colour, a gradient, a floor before a wall, or a checked cloth."""
    if view.background in ("white", "grey"):
        return np.full((size, size, 3), {"white": 255, "grey": 206}[view.background], np.uint8)
    near, far = (
        np.array(colorsys.hsv_to_rgb((hue + view.hue) % 1, saturation, value)) * 255
        for saturation, value in ((0.42, 0.80), (0.20, 0.96))
    )
    down, across = np.mgrid[0:size, 0:size] / size
    share = {  # of `near`, 'h w'
        "plain": np.full((size, size), 0.5),
        "gradient": (down + across) / 2,
        "horizon": (down >= 0.62).astype(float),
        "checks": ((down * 8).astype(int) + (across * 8).astype(int)) % 2 * 0.6,
    }[view.background][..., None]
    return (share * near + (1 - share) * far).round().astype(np.uint8)


def contact_sheet(images: np.ndarray, labels: Sequence[str], columns: int = 3, cell: int = 64) -> Image.Image:
    """images 'n s h w c' RGBA: n concepts in s styles, one beside the other over white, each concept's label below."""
    n, styles = images.shape[:2]
    gap, line = 12, 16
    width, height = columns * (styles * cell + gap) + gap, -(-n // columns) * (cell + line + 4) + gap
    sheet = Image.new("RGB", (width, height), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default()
    for i, (row, label) in enumerate(zip(images, labels, strict=True)):
        left, top = gap + i % columns * (styles * cell + gap), gap // 2 + i // columns * (cell + line + 4)
        for s, rgba in enumerate(row):
            small = Image.fromarray(rgba).resize((cell - 4, cell - 4), Image.Resampling.LANCZOS)
            sheet.paste(small, (left + s * cell + 2, top + 2), small)
        plain = label.translate(str.maketrans("’“”", '\'""')).encode("ascii", "replace").decode()  # all the font has
        draw.text((left + 2, top + cell), plain[:40], fill="black", font=font)
    return sheet
