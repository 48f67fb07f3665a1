"""Colours that a drawing can be given and judged by: their names, a drawing's own, recolouring, and pairs held out."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Colour:
    """hue in degrees; None for those that have none. saturation and lightness as in HSL, of an even surface."""

    hue: float | None
    saturation: float
    lightness: float


COLOURS = {
    "red": Colour(0, 0.80, 0.48),
    "orange": Colour(28, 0.95, 0.53),
    "yellow": Colour(52, 0.95, 0.55),
    "green": Colour(120, 0.60, 0.42),
    "turquoise": Colour(177, 0.70, 0.45),
    "blue": Colour(218, 0.85, 0.52),
    "purple": Colour(275, 0.60, 0.52),
    "pink": Colour(332, 0.85, 0.72),
    "brown": Colour(24, 0.50, 0.32),
    "black": Colour(None, 0.06, 0.15),
    "grey": Colour(None, 0.04, 0.55),
    "white": Colour(None, 0.15, 0.93),
}
HUES = tuple(name for name, colour in COLOURS.items() if colour.hue is not None and name != "brown")
NEAR = 32.0  # degrees: pixels of a hue no farther than this belong to a colour
MOST = 0.6  # of a drawing's area is to be of one colour, to be recoloured


def hsl(rgb: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Hue in degrees, saturation and lightness in [0, 1], from RGB '… 3' in [0, 1]."""
    r, g, b = np.moveaxis(rgb, -1, 0)
    high, low = np.maximum(np.maximum(r, g), b), np.minimum(np.minimum(r, g), b)
    lightness, range_ = (high + low) / 2, high - low
    safe = np.where(range_ > 0, range_, 1)
    sector = np.select([high == r, high == g], [(g - b) / safe % 6, (b - r) / safe + 2], (r - g) / safe + 4)
    saturation = range_ / np.maximum(1 - np.abs(2 * lightness - 1), 1e-6)
    return np.where(range_ > 0, 60 * sector, 0), saturation.clip(0, 1), lightness


def rgb_of(hue: np.ndarray, saturation: np.ndarray, lightness: np.ndarray) -> np.ndarray:
    """RGB '… 3' in [0, 1]; the inverse of `hsl`."""
    reach = saturation * np.minimum(lightness, 1 - lightness)
    k = (np.stack([np.zeros_like(hue), np.full_like(hue, 8), np.full_like(hue, 4)], -1) + hue[..., None] / 30) % 12
    return lightness[..., None] - reach[..., None] * np.minimum(np.minimum(k - 3, 9 - k), 1).clip(-1, 1)


def apart(a: np.ndarray | float, b: np.ndarray | float) -> np.ndarray:
    """Degrees between two hues, in [0, 180]."""
    return np.abs((np.asarray(a) - b + 180) % 360 - 180)


def mean_hue(hue: np.ndarray, weight: np.ndarray) -> float | None:
    """The direction of the weighted sum of unit vectors; None where nothing has a weight."""
    total = (weight * np.exp(1j * np.radians(hue))).sum()
    return float(np.degrees(np.angle(total)) % 360) if abs(total) > 1e-6 else None


def chroma(saturation: np.ndarray, lightness: np.ndarray) -> np.ndarray:
    """How coloured a pixel looks, in [0, 1]: near black and white it has a hue that nobody sees."""
    return saturation * (1 - np.abs(2 * lightness - 1))


def dominant_colour(picture: np.ndarray) -> float | None:
    """The hue that most of a drawing is of, in degrees; None where it has no such hue. picture: uint8 'h w 4'."""
    small = picture[::2, ::2].astype(np.float32) / 255
    hue, saturation, lightness = hsl(small[..., :3])
    alpha, coloured = small[..., 3], chroma(saturation, lightness)
    weight = alpha * coloured * (coloured > 0.15)
    histogram = np.histogram(hue, 36, (0, 360), weights=weight)[0]
    smooth = histogram + np.roll(histogram, 1) + np.roll(histogram, -1)
    main = mean_hue(hue, weight * (apart(hue, 10 * smooth.argmax() + 5) < NEAR))
    if main is None:
        return None
    share = (alpha * (apart(hue, main) < NEAR) * (coloured > 0.15)).sum() / max(alpha.sum(), 1)
    return main if share >= MOST else None


def recoloured(picture: np.ndarray, main: float, name: str) -> np.ndarray:
    """The drawing with its dominant colour, of hue `main`, exchanged for another; uint8 'h w 4', straight alpha.

    Shades are kept, and other hues, black lines and white highlights stay.
    """
    target, visible = COLOURS[name], picture[..., 3] > 0
    rgb, alpha = picture[visible][:, :3], picture[visible][:, 3]
    hue, saturation, lightness = hsl(rgb.astype(np.float32) / 255)
    own = ((NEAR + 10 - apart(hue, main)) / 10).clip(0, 1) * ((chroma(saturation, lightness) - 0.04) / 0.08).clip(0, 1)
    weight = own * alpha
    mean_s, mean_l = ((weight * x).sum() / max(weight.sum(), 1e-3) for x in (saturation, lightness))
    # powers keep black black and white white, and move the mean to the target's
    light = lightness.clip(1e-3, 1 - 1e-3) ** (np.log(target.lightness) / np.log(np.clip(mean_l, 0.05, 0.95)))
    shade = ((hue - main + 180) % 360 - 180) * 0.5 if target.hue is not None else 0  # a shade keeps half its leaning
    vivid = (saturation * target.saturation / max(mean_s, 1e-3)).clip(0, 1)
    new = rgb_of((np.full_like(hue, target.hue or 0) + shade) % 360, vivid, light)
    result = picture.copy()
    result[visible, :3] = (own[:, None] * new * 255 + (1 - own[:, None]) * rgb).round().clip(0, 255)
    return result


# A thing and a colour that no training picture shows together: by scripts/colour_pairs.py
PAIRS = (
    ("amphora", "purple"),
    ("hibiscus", "turquoise"),
    ("envelope", "green"),
    ("ox", "blue"),
    ("dog", "turquoise"),
    ("ticket", "purple"),
    ("ribbon", "green"),
    ("mushroom", "blue"),
    ("telephone", "green"),
    ("sushi", "blue"),
    ("blowfish", "purple"),
    ("sunflower", "turquoise"),
    ("grapes", "yellow"),
    ("dolphin", "pink"),
    ("hamster", "blue"),
    ("tomato", "turquoise"),
    ("pear", "pink"),
    ("cookie", "purple"),
    ("pushpin", "green"),
    ("trumpet", "turquoise"),
    ("leopard", "green"),
    ("tiger", "blue"),
    ("whale", "red"),
    ("camel", "purple"),
    ("bug", "purple"),
    ("trophy", "turquoise"),
    ("peach", "green"),
    ("bookmark", "purple"),
    ("sun", "blue"),
    ("chestnut", "turquoise"),
)
# and those that the sheets of `eval.sheets` and of the README draw
SHOWN = (
    ("apple", "blue"),
    ("banana", "purple"),
    ("elephant", "pink"),
    ("frog", "red"),
    ("fox", "blue"),
    ("octopus", "yellow"),
    ("unicorn", "green"),
    ("fish", "green"),
    ("rose", "black"),
    ("house", "purple"),
    ("butterfly", "orange"),
    ("rocket", "pink"),
    ("guitar", "red"),
    ("umbrella", "blue"),
    ("bicycle", "green"),
    ("cat face", "green"),
)


def is_held_out(noun: str, colour: str) -> bool:
    """Whether such a thing in this colour is for measuring only: "cat face" holds back every cat."""
    words = set(noun.split())
    return any(colour == own and thing.split()[0] in words for thing, own in (*PAIRS, *SHOWN))
