"""Strips of images: the forward process, and a denoising trajectory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from minisd.plots.figures import LARGE, SMALL, PathLike, as_panel, reduced, save, strip
from minisd.plots.schedules import Schedules, named_schedules

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL.Image import Image

SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def plot_noising(
    image: Image,
    out: PathLike,
    schedules: Schedules = ("linear", "cosine"),
    *,
    steps: int = 8,
    size: int = 128,
    seed: int = 0,
) -> Path:
    """The forward process q(x_t | x_0) on an image, one row per schedule (Nichol & Dhariwal 2021, figure 3).

    schedules: as `plot_schedules` takes them, all of one length T. All panels share one noise, drawn from `seed`, and
    all rows the same `steps` timesteps, evenly spaced from 0 to T-1; below each stands its signal-to-noise ratio
    ᾱ/(1-ᾱ). size: the longer side to which a larger image is reduced before noise is added, since how much of an image
    survives depends on its resolution.
    """
    return save(noising_figure(image, schedules, steps=steps, size=size, seed=seed), out)


def noising_figure(
    image: Image, schedules: Schedules = ("linear", "cosine"), *, steps: int = 8, size: int = 128, seed: int = 0
) -> Figure:
    """`plot_noising` as a Figure."""
    named = named_schedules(schedules)
    lengths = {schedule.num_timesteps for schedule in named.values()}
    if len(lengths) > 1:
        raise ValueError(f"schedules of {sorted(lengths)} steps share no timesteps: compare schedules of one length")
    if not 2 <= steps <= min(lengths):
        raise ValueError(f"steps is {steps}: show 2 to {min(lengths)}")
    x_0 = _to_tensor(reduced(image, size))
    noise = torch.randn(x_0.shape, generator=torch.Generator().manual_seed(seed))
    times = [round(i * (min(lengths) - 1) / (steps - 1)) for i in range(steps)]
    rows = [[as_panel(_to_image(s.q_sample(x_0, t, noise))) for t in times] for s in named.values()]
    figure, panels = strip(len(named), steps, rows[0][0].size, captions=True, row_titles=list(named))
    for row, images, schedule in zip(panels, rows, named.values(), strict=True):
        for panel, noised, t in zip(row, images, times, strict=True):
            panel.imshow(noised)
            panel.set_xlabel(f"SNR {_short(schedule.snr[t].item())}", fontsize=SMALL)
    for panel, t in zip(panels[0], times, strict=True):
        panel.set_title(f"t = {t}", fontsize=LARGE)
    return figure


def plot_trajectory(frames: Sequence[tuple[float, Image]], out: PathLike, *, panels: int = 10) -> Path:
    """The predicted x_0, decoded, at each timestep of sampling.

    frames: (t, image) in the order of sampling. If there are more than `panels`, so many are shown, evenly spaced, the
    first and the last included.
    """
    return save(trajectory_figure(frames, panels=panels), out)


def trajectory_figure(frames: Sequence[tuple[float, Image]], *, panels: int = 10) -> Figure:
    """`plot_trajectory` as a Figure."""
    if not frames or panels < 1:
        raise ValueError(f"{len(frames)} frames in {panels} panels: give at least one of each")
    n = min(panels, len(frames))
    chosen = [frames[round(i * (len(frames) - 1) / max(n - 1, 1))] for i in range(n)]
    figure, rows = strip(1, n, as_panel(chosen[0][1]).size)
    for panel, (t, image) in zip(rows[0], chosen, strict=True):
        panel.imshow(as_panel(image))
        panel.set_title(f"t = {float(t):.4g}", fontsize=LARGE)
    return figure


def _to_tensor(image: Image) -> Tensor:
    return rearrange(torch.from_numpy(np.array(image)), "h w c -> 1 c h w") / 127.5 - 1


def _to_image(x: Tensor) -> Image:
    from PIL import Image as pil

    pixels = ((x + 1) * 127.5).round().clamp(0, 255).byte()
    return pil.fromarray(rearrange(pixels, "1 c h w -> h w c").numpy())


def _short(number: float) -> str:
    """Two digits that fit below a small image: 0.33, 120, 4.0·10⁻⁵."""
    if number == 0 or 0.01 <= number < 1000:
        return f"{float(f'{number:.2g}'):g}"
    mantissa, exponent = f"{number:.1e}".split("e")
    return f"{mantissa}·10{str(int(exponent)).translate(SUPERSCRIPTS)}"
