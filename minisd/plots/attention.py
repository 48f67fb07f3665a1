"""Cross-attention maps: where an image attends to each word of its prompt."""

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
    """One panel per word: its attention map as a heat map over the dimmed image (Hertz et al. 2022).

    maps: 'l h w', one image of `AttentionMaps.mean()`. words: (word, positions among the l tokens), as `prompt_words`
    returns them; a word's tokens are summed. Every panel is scaled from its own minimum to its own maximum, which stand
    below it as percentages of all attention at those pixels: where they hardly differ, it shows little but noise.
    Special tokens, BOS above all, take most of the attention.
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
    panel_image = as_panel(image)
    figure, grid = strip(
        rows, math.ceil((len(words) + 1) / rows), panel_image.size, captions=True, titles_in_every_row=True
    )
    panels = [panel for row in grid for panel in row]
    panels[0].imshow(panel_image)
    panels[0].set_title("image", fontsize=LARGE, style="italic")
    for panel, (text, positions) in zip(panels[1:], words, strict=False):
        heat = maps[list(positions)].sum(0).double().cpu().numpy()
        panel.imshow(_heat_map(heat, panel_image))
        # a prompt may contain dollar signs, which are no formula
        panel.set_title(_shortened(text), fontsize=LARGE, parse_math=False)
        panel.set_xlabel(f"{100 * heat.min():.1f} – {100 * heat.max():.1f} %", fontsize=SMALL)
    for panel in panels[len(words) + 1 :]:
        panel.remove()
    return figure


def _heat_map(heat: np.ndarray, panel_image: Image) -> np.ndarray:
    """The heat map 'h w', scaled to [0, 1] and resized, in matplotlib's inferno over the dimmed grey image."""
    import matplotlib
    from PIL import Image as pil

    dimmed = np.asarray(panel_image.convert("L").convert("RGB")) / 255 * 0.4
    scaled = pil.fromarray(((heat - heat.min()) / max(np.ptp(heat), 1e-30)).astype(np.float32))
    scaled = np.asarray(scaled.resize(panel_image.size, pil.Resampling.BICUBIC)).clip(0, 1)
    light = matplotlib.colormaps["inferno"](scaled)[..., :3]
    opacity = 0.8 * scaled[..., None]  # below 1, so that the image is seen even where the map is brightest
    return dimmed * (1 - opacity) + light * opacity


def _shortened(text: str, length: int = 14) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"
