"""Does a picture show what its prompt put together: a thing in a colour that none of its kind has, a thing on a ground.

The judges are rules on pixels; no network has a part in them.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from minisd.eval.drawings import Drawings
from minisd.eval.retrieval import THUMBNAIL
from minisd.training.colours import COLOURS, PAIRS, apart, chroma, hsl, mean_hue
from minisd.training.grounds import GROUNDS, painted

HUE_NEAR = 30.0  # degrees from the asked colour
APART = 0.12  # of a pixel from the ground in one channel, of [0, 1], to belong to the thing
CORNER = 0.2  # of the side: where the ground shows
SHRUNK = 0.75  # of the side: real drawings on grounds, as training's scenes have them
FLOOR = 0.02  # of the deviation of a feature, of [0, 1]: what is painted varies less than what is decoded
THINGS = ("a cat face", "a rocket", "a house", "an umbrella", "a red apple", "a penguin", "a guitar", "a crown")
COLOUR_GROUNDS = ("green", "blue", "yellow", "pink", "orange", "purple", "black")
GROUND_PROMPTS = 30


def colour_prompts() -> list[str]:
    """ "a pink dolphin": the pairs that no training picture shows."""
    return [f"a {colour} {thing}" if colour != "orange" else f"an {colour} {thing}" for thing, colour in PAIRS]


def ground_prompts() -> list[tuple[str, str]]:
    """Prompts and the names of their grounds: things in turn, textures and colours in turn."""
    names = [*GROUNDS, *COLOUR_GROUNDS]
    pairs = [(THINGS[(i + turn) % len(THINGS)], name) for turn, (i, name) in product(range(2), enumerate(names))]
    return [(f"{thing} {ground_words(name)}", name) for thing, name in pairs[:GROUND_PROMPTS]]


def ground_words(name: str) -> str:
    """As the captions of training's scenes have it."""
    if name in GROUNDS:
        return GROUNDS[name].words
    return f"on {'an' if name[0] in 'aeiou' else 'a'} {name} background"


def foreground(image: Tensor) -> Tensor:
    """Where a picture 'b 3 h w' in [0, 1] differs from the median colour of its border, bool 'b h w'."""
    side = image.shape[-1]
    edge = torch.ones(side, side, dtype=torch.bool)
    edge[1:-1, 1:-1] = False
    ground = image[:, :, edge].median(-1).values
    return ((image - ground[:, :, None, None]).abs() > APART).any(1)


def hues(images: Tensor) -> list[float | None]:
    """The mean hue of the foreground of each of uint8 'b 3 h w', by how coloured its pixels are; None where grey."""
    found = []
    for image, mask in zip(images, foreground(images.float() / 255), strict=True):
        hue, saturation, lightness = hsl(rearrange(image.numpy(), "c h w -> h w c") / 255)
        coloured = chroma(saturation, lightness)
        weight = mask.numpy() * coloured * (coloured > 0.1)
        found.append(mean_hue(hue, weight) if weight.sum() > 0.02 * max(mask.sum().item(), 1) else None)
    return found


def has_hue(images: Tensor, colours: Sequence[str]) -> Tensor:
    """Whether each picture's foreground has the hue of its colour's name, 'b', 1.0 or 0.0."""
    pairs = zip(hues(images), colours, strict=True)
    return torch.tensor([float(h is not None and apart(h, COLOURS[c].hue) <= HUE_NEAR) for h, c in pairs]).double()


def shapes(images: Tensor) -> Tensor:
    """Grey thumbnails of what stands on the ground, cut out, centred and brought to one size; 'b 256' of length 1.

    Light is measured from the ground's, and less its mean, so that a change of colour changes little.
    """
    rows = []
    for image, mask in zip(images.float() / 255, foreground(images.float() / 255), strict=True):
        if not mask.any():
            rows.append(torch.zeros(THUMBNAIL * THUMBNAIL))
            continue
        down, across = mask.nonzero(as_tuple=True)
        grey = torch.where(mask, image.mean(0), 1.0)[down.min() : down.max() + 1, across.min() : across.max() + 1]
        height, width = grey.shape
        room = abs(height - width)
        sides = (0, 0, room // 2, room - room // 2) if width > height else (room // 2, room - room // 2, 0, 0)
        small = F.adaptive_avg_pool2d(F.pad(grey, sides, value=1.0)[None, None], THUMBNAIL).flatten()
        rows.append(F.normalize(small - small.mean(), dim=0))
    return torch.stack(rows)


def is_of_thing(drawings: Drawings, things: Sequence[str]) -> Tensor:
    """Which drawing's words name which thing, bool 'k n': "a red apple" and "an apple" are both apples."""
    words = [set(text.replace(",", " ").split()) for text in drawings.words]
    return torch.tensor([[thing in own for own in words] for thing in things])


# -------------------------------------------------------------------------------------------------------------- grounds


class GroundJudge:
    """Which ground a picture has, by its corners: the likeliest of normal distributions, one for each ground.

    Learnt from painted grounds, of seeds that training's scenes do not have: `count` of each.
    """

    def __init__(self, side: int, count: int = 24):
        self.names = [None, *(name for name in COLOURS if name != "white"), *GROUNDS]
        drawn = [[self._painted(name, side, seed) for seed in range(count)] for name in self.names]
        features = torch.stack([self.features(torch.stack(some)) for some in drawn])
        self.means, self.deviations = features.mean(1), (features.var(1) + FLOOR**2).sqrt()

    @staticmethod
    def _painted(name: str | None, side: int, seed: int) -> Tensor:
        rng = np.random.default_rng([20_000_000, seed])
        return rearrange(torch.from_numpy(painted(name, side, rng)), "h w c -> c h w")

    @staticmethod
    def features(images: Tensor) -> Tensor:
        """Of uint8 'b 3 h w': colour, its deviation, and how light changes across and down, 'b 8'.

        Of each the median of the four corners: a thing may cover one.
        """
        x = images.float() / 255
        n = max(2, round(CORNER * x.shape[-1]))
        corners = torch.stack([x[..., :n, :n], x[..., :n, -n:], x[..., -n:, :n], x[..., -n:, -n:]], dim=1)
        light = corners.mean(2)
        changes = [light.diff(dim=axis).abs().mean((-2, -1)) for axis in (-1, -2)]
        found = torch.cat([corners.mean((-2, -1)), corners.std((-2, -1)), torch.stack(changes, -1)], dim=-1)
        return found.quantile(0.5, dim=1)

    def __call__(self, images: Tensor) -> list[str | None]:
        apart = (self.features(images)[:, None] - self.means) / self.deviations
        return [self.names[i] for i in (apart.square() + 2 * self.deviations.log()).sum(-1).argmin(1)]

    def hits(self, images: Tensor, grounds: Sequence[str | None]) -> Tensor:
        """Whether each picture has the ground that was asked for, 'b', 1.0 or 0.0."""
        return torch.tensor([float(a == b) for a, b in zip(self(images), grounds, strict=True)]).double()


def on_grounds(drawings: Tensor, grounds: Sequence[str]) -> Tensor:
    """Real drawings over white, a little smaller, put on grounds: pictures that are right. uint8 'b 3 h w'."""
    side = drawings.shape[-1]
    inner = round(SHRUNK * side)
    before = (side - inner) // 2
    small = F.interpolate(drawings.float(), size=(inner, inner), mode="bilinear", antialias=True)
    small = F.pad(small, (before, side - inner - before) * 2, value=255.0)
    painted_ones = []
    for i, name in enumerate(grounds):
        rng = np.random.default_rng([30_000_000, i])
        painted_ones.append(rearrange(torch.from_numpy(painted(name, side, rng)), "h w c -> c h w"))
    mask = foreground(small / 255)[:, None]
    return torch.where(mask, small.round().to(torch.uint8), torch.stack(painted_ones))
