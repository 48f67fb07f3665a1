"""Grounds that a thing can stand on: painted by rules, each with the words for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image

from minisd.training.colours import COLOURS, rgb_of


@dataclass(frozen=True)
class Ground:
    """words: what a caption says. paint: (side, rng) → RGB 'h w 3' in [0, 1]."""

    words: str
    paint: Callable[[int, np.random.Generator], np.ndarray]


def painted(name: str | None, side: int, rng: np.random.Generator) -> np.ndarray:
    """uint8 'side side 3': white for None, a colour of COLOURS a little varied, or one of GROUNDS."""
    if name is None:
        return np.full((side, side, 3), 255, np.uint8)
    if name in GROUNDS:
        picture = GROUNDS[name].paint(side, rng)
    else:
        picture = np.broadcast_to(even(COLOURS[name], rng), (side, side, 3))
    return (picture.clip(0, 1) * 255).round().astype(np.uint8)


def even(colour, rng: np.random.Generator) -> np.ndarray:
    """One RGB of a colour, its hue varied by 6 degrees, its saturation and lightness by a little."""
    hue = np.float64(((colour.hue or 0) + rng.uniform(-6, 6)) % 360)
    saturation = np.float64(np.clip(colour.saturation * rng.uniform(0.75, 1.0), 0, 1))
    return rgb_of(hue, saturation, np.float64(np.clip(colour.lightness + rng.uniform(-0.05, 0.05), 0, 1)))


def noise(side: int, rng: np.random.Generator, across: float, down: float) -> np.ndarray:
    """Smooth noise 'h w' in about [-1, 1], of so many waves across and down."""
    grid = rng.standard_normal((max(2, round(down) + 1), max(2, round(across) + 1))).astype(np.float32)
    return np.asarray(Image.fromarray(grid).resize((side, side), Image.Resampling.BICUBIC)) / 2


def mixed(share: np.ndarray, dark: tuple, light: tuple) -> np.ndarray:
    """From the one RGB to the other by a share 'h w' in [0, 1]."""
    share = share.clip(0, 1)[..., None]
    return (1 - share) * np.array(dark) + share * np.array(light)


def grass(side: int, rng: np.random.Generator) -> np.ndarray:
    share = 0.45 + 0.5 * noise(side, rng, 45, 9) + 0.25 * noise(side, rng, 4, 4)
    return mixed(share, (0.16, 0.42, 0.10), (0.52, 0.78, 0.25))


def sand(side: int, rng: np.random.Generator) -> np.ndarray:
    share = 0.5 + 0.25 * noise(side, rng, 3, 12) + 0.22 * noise(side, rng, 64, 64)
    return mixed(share, (0.80, 0.66, 0.42), (0.97, 0.88, 0.66))


def snow(side: int, rng: np.random.Generator) -> np.ndarray:
    picture = mixed(0.6 + 0.6 * noise(side, rng, 3, 5), (0.66, 0.78, 0.93), (0.93, 0.96, 1.0))
    return dotted(picture, rng, count=26, radius=(0.006, 0.016), colour=(1.0, 1.0, 1.0))


def water(side: int, rng: np.random.Generator) -> np.ndarray:
    share = 0.35 + 0.5 * noise(side, rng, 5, 22) + 0.2 * noise(side, rng, 2, 3)
    return mixed(share, (0.05, 0.36, 0.62), (0.45, 0.78, 0.92))


def sky(side: int, rng: np.random.Generator) -> np.ndarray:
    down = np.linspace(0, 1, side)[:, None] + np.zeros((1, side))
    blue = mixed(down, (0.30, 0.60, 0.93), (0.72, 0.88, 0.99))
    cloud = (1.6 * (noise(side, rng, 3, 4) + 0.5 * noise(side, rng, 7, 9)) - 0.25).clip(0, 0.95)[..., None]
    return (1 - cloud) * blue + cloud


def night(side: int, rng: np.random.Generator) -> np.ndarray:
    down = np.linspace(0, 1, side)[:, None] + np.zeros((1, side))
    dark = mixed(down + 0.2 * noise(side, rng, 2, 2), (0.03, 0.04, 0.16), (0.13, 0.14, 0.36))
    return dotted(dark, rng, count=40, radius=(0.005, 0.014), colour=(1.0, 0.97, 0.80))


def wood(side: int, rng: np.random.Generator) -> np.ndarray:
    planks = 4
    grain = np.concatenate([noise(side, rng, 3, 40)[: -(-side // planks)] for _ in range(planks)])[:side]
    tone = np.repeat(rng.uniform(-0.15, 0.15, planks), -(-side // planks))[:side, None]
    picture = mixed(0.5 + 0.45 * grain + tone, (0.45, 0.27, 0.13), (0.78, 0.55, 0.32))
    picture[:: -(-side // planks)] *= 0.6
    return picture


def bricks(side: int, rng: np.random.Generator) -> np.ndarray:
    rows, columns = 8, 4
    y, x = np.mgrid[0:side, 0:side] / side
    row = (y * rows).astype(int)
    across = x * columns + 0.5 * (row % 2)
    tone = rng.uniform(-0.3, 0.3, (rows, columns + 1))[row, across.astype(int)]
    picture = mixed(0.5 + tone + 0.1 * noise(side, rng, 50, 50), (0.55, 0.20, 0.14), (0.80, 0.38, 0.27))
    mortar = ((y * rows) % 1 < 0.13) | (across % 1 < 0.07)
    return np.where(mortar[..., None], np.array((0.82, 0.78, 0.72)), picture)


def dotted(picture: np.ndarray, rng: np.random.Generator, *, count: int, radius: tuple, colour: tuple) -> np.ndarray:
    """With soft discs here and there, of these radii in sides of the picture."""
    side, picture = len(picture), picture.copy()
    for _ in range(count):
        (y, x), r = rng.uniform(0, side, 2), rng.uniform(*radius) * side
        top, left = int(max(y - 2 * r, 0)), int(max(x - 2 * r, 0))
        part = picture[top : int(y + 2 * r) + 1, left : int(x + 2 * r) + 1]
        down, across = np.ogrid[: part.shape[0], : part.shape[1]]
        share = (1.5 - np.hypot(down + top + 0.5 - y, across + left + 0.5 - x) / r).clip(0, 1)[..., None]
        part += share * (np.array(colour) - part)
    return picture


GROUNDS = {
    "grass": Ground("on grass", grass),
    "sand": Ground("on sand", sand),
    "snow": Ground("in the snow", snow),
    "water": Ground("on water", water),
    "sky": Ground("in the sky", sky),
    "night": Ground("under a starry sky", night),
    "wood": Ground("on a wooden table", wood),
    "bricks": Ground("in front of a brick wall", bricks),
}
