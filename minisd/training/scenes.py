"""Scenes composed of drawings with exact alpha: recoloured, on a ground, large or small, somewhere, two together.

What was done is what the caption says, so captions are true. Scene i of a seed is always the same picture.
"""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from minisd.training.captions import with_article
from minisd.training.colours import COLOURS, HUES, dominant_colour, is_held_out, recoloured
from minisd.training.data import Pictures, is_emoji, load_pictures, read_records
from minisd.training.grounds import GROUNDS, painted

UNFIT = ("place-religious", "religion")  # no jokes with what is holy to somebody
GROUPS = ("animals-nature", "food-drink", "objects", "travel-places", "activities", "smileys-emotion")
KINDS = {"colour": 35, "ground": 25, "colour, ground": 15, "place": 10, "two": 15}  # relative shares
PLACES = {  # of a thing's middle, in sides of the picture, across and down
    "on the left": (0.27, 0.5),
    "on the right": (0.73, 0.5),
    "at the top": (0.5, 0.27),
    "at the bottom": (0.5, 0.73),
    "in the top left corner": (0.25, 0.25),
    "in the top right corner": (0.75, 0.25),
    "in the bottom left corner": (0.25, 0.75),
    "in the bottom right corner": (0.75, 0.75),
}
SIZES = {"small": (0.30, 0.42), "large": (0.95, 1.0)}  # of the picture's side
LEFT, RIGHT, ABOVE, BELOW = (0.26, 0.55), (0.74, 0.55), (0.5, 0.26), (0.5, 0.74)
TOGETHER = {  # what joins two names, and where the two are
    "and": (LEFT, RIGHT),
    "to the left of": (LEFT, RIGHT),
    "to the right of": (RIGHT, LEFT),
    "above": (ABOVE, BELOW),
    "below": (BELOW, ABOVE),
    "with": ((0.42, 0.46), (0.76, 0.74)),
}


@dataclass(frozen=True)
class Thing:
    """One drawing in a scene. row: of the drawing; noun: its label without its own colour; colour: None leaves that;
    centre across and down, and scale, in sides of the picture."""

    row: int
    label: str
    noun: str
    colour: str | None = None
    scale: float = 0.8
    centre: tuple[float, float] = (0.5, 0.5)

    @property
    def words(self) -> str:
        return self.label if self.colour is None else f"{self.colour} {self.noun}"


@dataclass(frozen=True)
class Scene:
    """ground: a colour, a name in GROUNDS, or None for white. number: of all chance in painting it."""

    things: tuple[Thing, ...]
    caption: str
    ground: str | None
    style: str
    number: int

    @property
    def captions(self) -> tuple[str, ...]:
        return f"{self.caption}, {self.style} style", self.caption


class Composer:
    """Scenes of the drawings of a data set.

    pixels: uint8 'n h w 4' with straight alpha. records: what captions.jsonl says of each. visits: how often each is
    seen, which is also how often it comes into a scene.
    """

    def __init__(self, pixels: np.ndarray, records: Sequence[Mapping], visits: Sequence[int], seed: int = 0):
        self.pixels, self.records, self.seed = pixels, records, seed
        self.nouns = [noun(record["label"]) if is_fit(record) else None for record in records]
        self.hues = [n and dominant_colour(picture) for n, picture in zip(self.nouns, pixels, strict=True)]
        self.weights = list(visits)
        self.of_style: dict[str, list[int]] = {}
        for row, record in enumerate(records):
            if self.nouns[row]:
                self.of_style.setdefault(record["style"], []).append(row)
        if not any(hue is not None for hue in self.hues):
            raise ValueError("no drawing has one dominant colour: scenes need some that can be recoloured")

    def plan(self, number: int) -> Scene:
        """What scene `number` shows."""
        chance = random.Random(f"{self.seed}/{number}")
        kind = chance.choices(list(KINDS), list(KINDS.values()))[0]
        colour = "colour" in kind or (kind in ("place", "two") and chance.random() < 0.3)
        is_on_ground = "ground" in kind or (kind in ("place", "two") and chance.random() < 0.4)
        ground = chance.choice([*COLOURS, *GROUNDS, *GROUNDS]) if is_on_ground else None  # textures twice as often
        first = self._thing(chance, colour=colour, ground=ground)
        style = self.records[first.row]["style"]
        if kind == "two":
            second = self._thing(chance, colour=chance.random() < 0.3, ground=ground, style=style, beside=first)
            joint = chance.choice(list(TOGETHER))
            sizes = (0.68, 0.4) if joint == "with" else (0.47, 0.47)
            things = tuple(
                replace(thing, scale=scale * chance.uniform(0.92, 1.04), centre=_near(chance, centre, 0.02))
                for thing, scale, centre in zip((first, second), sizes, TOGETHER[joint], strict=True)
            )
            caption = f"{with_article(first.words)} {joint} {with_article(second.words)}"
        elif kind == "place":
            size = chance.choice([None, *SIZES])
            place = chance.choice(list(PLACES)) if size != "large" else None
            scale = chance.uniform(*SIZES.get(size, (0.40, 0.50)))
            things = (replace(first, scale=scale, centre=_near(chance, PLACES.get(place, (0.5, 0.5)), 0.02)),)
            words = with_article(f"{size} {first.words}" if size else first.words)
            caption = f"{words} {place}" if place else words
        else:
            scale = chance.uniform(0.6, 0.9)
            things = (replace(first, scale=scale, centre=_near(chance, (0.5, 0.5), 0.04)),)
            caption = with_article(first.words)
        if ground is not None:
            caption += f" {GROUNDS[ground].words}" if ground in GROUNDS else f" on {with_article(ground)} background"
        return Scene(things, caption, ground, style, number)

    def _thing(
        self, chance: random.Random, *, colour: bool, ground: str | None, style: str | None = None, beside=None
    ) -> Thing:
        """A drawing; in a colour that stands out from the ground, and that is not held out with such a thing."""
        if style is None:
            style = chance.choices(list(self.of_style), [self._share(rows) for rows in self.of_style.values()])[0]
        rows = [row for row in self.of_style[style] if not colour or self.hues[row] is not None]
        rows = [row for row in rows if beside is None or self.nouns[row] != beside.noun]
        if not rows:
            return self._thing(chance, colour=False, ground=ground, style=style, beside=None) if colour else beside
        row = chance.choices(rows, [self.weights[row] for row in rows])[0]
        name = self.nouns[row]
        able = [c for c in COLOURS if c != ground and not is_held_out(name, c)] if colour else []
        able = [c for c in able if c != "white" or ground is not None]
        if self.records[row]["group"] == "smileys-emotion":
            able = [c for c in able if c in HUES]  # a black or brown face would be taken for a person's
        return Thing(row, self.records[row]["label"].lower(), name, chance.choice(able) if able else None)

    def _share(self, rows: Sequence[int]) -> int:
        return sum(self.weights[row] for row in rows)

    def paint(self, scene: Scene) -> np.ndarray:
        """The picture, uint8 'h w 4', opaque."""
        side = self.pixels.shape[1]
        rng = np.random.default_rng([self.seed, scene.number])
        canvas = Image.fromarray(painted(scene.ground, side, rng))
        for thing in scene.things:
            small = _resized(self.pixels[thing.row], max(1, round(thing.scale * side)))
            if thing.colour is not None:
                small = Image.fromarray(recoloured(np.asarray(small), self.hues[thing.row], thing.colour))
            corner = tuple(round(place * side - small.width / 2) for place in thing.centre)
            canvas.paste(small, corner, small)
        return np.dstack([np.asarray(canvas), np.full((side, side), 255, np.uint8)])


def is_fit(record: Mapping) -> bool:
    """Whether a drawing may come into scenes: a thing, an animal or a face, no person and no sign."""
    return record["group"] in GROUPS and record.get("kind") not in UNFIT


def _near(chance: random.Random, centre: tuple[float, float], most: float) -> tuple[float, float]:
    return centre[0] + chance.uniform(-most, most), centre[1] + chance.uniform(-most, most)


def _resized(picture: np.ndarray, side: int) -> Image.Image:
    """Straight RGBA to another size, without the colours of transparent pixels bleeding in."""
    image = Image.fromarray(np.ascontiguousarray(picture)).convert("RGBa")
    return image.resize((side, side), Image.Resampling.LANCZOS).convert("RGBA")


def noun(label: str) -> str | None:
    """What one can put a colour before: "red apple" → "apple"; None for "keycap: 1", "leafy green" and the like."""
    first, *rest = label.lower().split()
    words = rest if first in COLOURS else [first, *rest]
    if not words or any(word in COLOURS for word in words) or any(not (c.isalpha() or c in " -’") for c in label):
        return None
    return " ".join(words)


class Stacked:
    """The pixels of drawings and, after them, of scenes that are painted whenever they are asked for.

    Of an array it has what `Pictures` needs: shape, dtype, and rows by index.
    """

    dtype = np.dtype(np.uint8)

    def __init__(self, composer: Composer, scenes: Sequence[Scene]):
        self.composer, self.scenes = composer, scenes
        self.shape = (len(composer.pixels) + len(scenes), *composer.pixels.shape[1:])

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows) -> np.ndarray:
        return np.stack([self._one(int(row)) for row in np.asarray(rows).reshape(-1)])

    def _one(self, row: int) -> np.ndarray:
        drawn = len(self.composer.pixels)
        return self.composer.pixels[row] if row < drawn else self.composer.paint(self.scenes[row - drawn])


def load_training(folder: str | os.PathLike, *, size: int | None = None, scenes: int = 0) -> Pictures:
    """The training pictures of a folder, and, where they are the emoji, so many scenes composed of them."""
    pictures = load_pictures(folder, size=size)
    if not scenes or not is_emoji(Path(folder)):
        return pictures
    return with_scenes(pictures, [r for r in read_records(Path(folder)) if r["split"] == "train"], scenes)


def with_scenes(drawings: Pictures, records: Sequence[Mapping], count: int, seed: int = 0) -> Pictures:
    """The drawings and `count` scenes made of them, each seen once in a pass.

    records: what captions.jsonl says of each drawing. The digest is that of what is said and of some that are painted.
    """
    composer = Composer(drawings.pixels, records, drawings.visits, seed)
    scenes = [composer.plan(number) for number in range(count)]
    digest = hashlib.sha256(drawings.digest.encode())
    for scene in scenes:
        digest.update(repr(scene).encode())
    for scene in scenes[:64]:
        digest.update(composer.paint(scene).tobytes())
    return Pictures(
        Stacked(composer, scenes),
        drawings.captions + tuple(scene.captions for scene in scenes),
        drawings.names + tuple(f"scene {scene.number}: {scene.caption}" for scene in scenes),
        digest.hexdigest()[:16],
        drawings.visits + (1,) * count,
    )
