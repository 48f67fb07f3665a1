"""Pictures to look at: a sheet of fixed prompts, and one without words whose objects a person is to name."""

from __future__ import annotations

import random
import textwrap
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

# what the vendors draw, then what none of them drew
PROMPTS = (
    "a red apple",
    "a slice of pizza",
    "a strawberry",
    "a birthday cake",
    "a cat face",
    "a dog face",
    "a fox",
    "a penguin",
    "an octopus",
    "a butterfly",
    "a turtle",
    "a unicorn",
    "a house",
    "a castle",
    "a rocket",
    "a bicycle",
    "an umbrella",
    "a guitar",
    "a soccer ball",
    "a crown",
    "a smiling face with sunglasses",
    "a red heart",
    "a snowman",
    "a rainbow",
    "a blue apple",
    "a purple banana",
    "a green heart with an arrow",
    "a pink elephant",
    "a red frog",
    "a blue fox",
    "a yellow octopus",
    "a green unicorn",
    "a green fish",
    "a black rose",
    "a purple house",
    "an orange butterfly",
    "a pink rocket",
    "a red guitar, flat style",
    "a blue umbrella, noto style",
    "a green bicycle, fluent style",
    "a cat with a crown",
    "a dog with sunglasses",
    "a penguin with an umbrella",
    "a frog with a top hat",
    "a pumpkin with a heart",
    "a house on the moon",
    "a robot with a flower",
    "a snowman with a guitar",
)
# each with a concept of its own in the training set, nothing of it held out
COMMON = (
    "a red apple",
    "a banana",
    "a carrot",
    "a hamburger",
    "a cat face",
    "an elephant",
    "a penguin",
    "a butterfly",
    "a fish",
    "a house",
    "an automobile",
    "an airplane",
    "an umbrella",
    "a guitar",
    "a key",
    "a soccer ball",
    "a red heart",
    "a crown",
    "an evergreen tree",
    "scissors",
)
FONT, LINE, MARGIN = 11, 13, 4  # pixels


def captioned(images: Sequence[Image.Image], texts: Sequence[str], columns: int) -> Image.Image:
    """Pictures of one size in rows, a text of up to two lines under each."""
    if not images or len(images) != len(texts):
        raise ValueError(f"{len(images)} pictures and {len(texts)} texts: a sheet needs one for each, and one at least")
    width, height = images[0].width, images[0].height
    font = ImageFont.load_default(FONT)
    across = max(1, int(width / font.getlength("n")))
    wrapped = [textwrap.wrap(text, across)[:2] for text in texts]
    pitch = height + LINE * max(map(len, wrapped)) + MARGIN
    sheet = Image.new("RGB", (columns * width, -(-len(images) // columns) * pitch), "white")
    pen = ImageDraw.Draw(sheet)
    for n, (image, lines) in enumerate(zip(images, wrapped, strict=True)):
        left, top = n % columns * width, n // columns * pitch
        sheet.paste(image, (left, top))
        for i, line in enumerate(lines):
            middle = left + (width - font.getlength(line)) / 2
            pen.text((middle, top + height + i * LINE), line, "black", font)
    return sheet


def shuffled(prompts: Sequence[str], seed: int) -> list[str]:
    """The prompts in an order that tells nothing, the same for the same seed."""
    return random.Random(seed).sample(list(prompts), len(prompts))
