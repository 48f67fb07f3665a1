"""Where a picture looks at each word of its prompt."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from minisd.plots.figures import LARGE, SMALL, PathLike, as_panel, save, strip

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL.Image import Image


def plot_attention(
    maps: Tensor, words: Sequence[tuple[str, Sequence[int]]], image: Image, out: PathLike, *, columns: int = 6
) -> Path:
    """One panel per word: where the picture looks at it, as light over the dimmed picture (Hertz et al. 2022).

    maps: 'l h w', one image of `AttentionMaps.mean()`. words: (word, positions among the l tokens), as `prompt_words`
    gives them; the tokens of a word are added up. Every panel is scaled to its own maximum, which stands beside the
    word as a share of all attention at that place: tokens that are no words (BOS above all) take most of it.
    """
    return save(attention_figure(maps, words, image, columns=columns), out)


def attention_figure(
    maps: Tensor, words: Sequence[tuple[str, Sequence[int]]], image: Image, *, columns: int = 6
) -> Figure:
    """`plot_attention` as a Figure."""
    if maps.ndim != 3:
        raise ValueError(f"maps are 'l h w' of one image, got {tuple(maps.shape)}: take one of maps.mean(), as in [0]")
    if not words:
        raise ValueError("the prompt has no words, so there is no attention to show: give a prompt")
    if beyond := [text for text, positions in words if not all(0 <= p < len(maps) for p in positions)]:
        raise ValueError(
            f"{beyond[0]!r} stands beyond the {len(maps)} tokens of the maps: were they of another prompt?"
        )
    rows = math.ceil((len(words) + 1) / columns)
    picture = as_panel(image)
    figure, grid = strip(
        rows, math.ceil((len(words) + 1) / rows), picture.size, captions=True, titles_in_every_row=True
    )
    panels = [panel for row in grid for panel in row]
    panels[0].imshow(picture)
    panels[0].set_title("image", fontsize=LARGE, style="italic")
    for panel, (text, positions) in zip(panels[1:], words, strict=False):
        heat = maps[list(positions)].sum(0).double().cpu().numpy()
        panel.imshow(_glow(heat, picture))
        # a prompt may hold dollar signs: they are no formula
        panel.set_title(_cut(text), fontsize=LARGE, parse_math=False)
        panel.set_xlabel(f"max {heat.max():.1%}", fontsize=SMALL)
    for panel in panels[len(words) + 1 :]:
        panel.remove()
    return figure


def _glow(heat: np.ndarray, picture: Image) -> np.ndarray:
    """Heat 'h w', scaled to its maximum and resized, as light in matplotlib's inferno over the dimmed grey picture."""
    import matplotlib
    from PIL import Image as pil

    dimmed = np.asarray(picture.convert("L").convert("RGB")) / 255 * 0.4
    scaled = pil.fromarray((heat / max(heat.max(), 1e-30)).astype(np.float32))
    scaled = np.asarray(scaled.resize(picture.size, pil.Resampling.BICUBIC)).clip(0, 1)
    light = matplotlib.colormaps["inferno"](scaled)[..., :3]
    return dimmed * (1 - scaled[..., None]) + light * scaled[..., None]


def _cut(text: str, length: int = 14) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"
