"""Noise schedules side by side: betas, ᾱ and log-SNR."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from minisd.diffusion.schedule import Schedule, cosine_betas, linear_betas, scaled_linear_betas, zero_terminal_snr
from minisd.plots.figures import LARGE, SMALL, PathLike, new_figure, save

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Schedules = Sequence[str] | Mapping[str, Schedule]

BETAS: dict[str, Callable[[], Tensor]] = {
    "linear": linear_betas,
    "scaled_linear": scaled_linear_betas,
    "cosine": cosine_betas,
}
ZERO_SNR = "-zsnr"  # "cosine-zsnr": the same betas rescaled to zero terminal SNR

# Okabe & Ito's palette for the colour-blind, without its yellow, which is invisible on white.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
LINES, DASHES = ("-", ":", "-."), ("--", (0, (2, 1)), (0, (6, 2, 1, 2)))  # by how often the colours were used up


def plot_schedules(schedules: Schedules, out: PathLike) -> Path:
    """The betas, ᾱ and log-SNR of any number of schedules over time, in one figure.

    schedules: {label: Schedule}, or names: "linear", "scaled_linear", "cosine", and each with "-zsnr" behind it, which
    rescales it to zero terminal SNR (there the last log-SNR is -∞, and its line ends one step before).
    """
    return save(schedules_figure(schedules), out)


def schedules_figure(schedules: Schedules) -> Figure:
    """Three panels of one line per schedule, in the order given. x is t, or t/T where the schedules differ in T."""
    named = named_schedules(schedules)
    same_T = len({schedule.num_timesteps for schedule in named.values()}) == 1
    figure = new_figure(10, 3.7, "constrained")
    panels = figure.subplots(1, 3)
    styles = _styles(named)
    for label, schedule in named.items():
        t = np.arange(schedule.num_timesteps) / (1 if same_T else schedule.num_timesteps)
        values = (schedule.betas, schedule.alphas_cumprod, schedule.snr.log())
        for panel, value in zip(panels, values, strict=True):
            panel.plot(t, value.numpy(), **styles[label])
    panels[0].set_yscale("log")
    titles = ("noise added per step, βₜ (log scale)", "signal left, ᾱₜ", "log-SNR, ln ᾱₜ/(1−ᾱₜ)")
    for panel, title in zip(panels, titles, strict=True):
        panel.set_title(title, fontsize=LARGE)
        panel.set_xlabel("t" if same_T else "t / T", fontsize=LARGE)
        panel.tick_params(labelsize=SMALL)
        panel.grid(color="#dddddd", linewidth=0.6)
        panel.spines[["top", "right"]].set_visible(False)
        panel.margins(x=0.01)
    columns = min(len(named), 6 if max(map(len, named)) <= 18 else 3)
    legend = figure.legend(
        panels[0].lines, list(named), loc="outside lower center", ncols=columns, frameon=False, fontsize=LARGE
    )
    for text in legend.get_texts():
        text.set_parse_math(False)
    return figure


def named_schedules(schedules: Schedules) -> dict[str, Schedule]:
    """{label: Schedule} of names, or of a mapping as it is. ValueError for an unknown name, naming the known ones."""
    if isinstance(schedules, Mapping):
        named = dict(schedules)
    else:
        names = [schedules] if isinstance(schedules, str) else schedules
        named = {name: _schedule(name) for name in names}
    if not named:
        raise ValueError(f"no schedule was named: give one or more of {', '.join(_schedule_names())}")
    return named


def _schedule(name: str) -> Schedule:
    if name not in _schedule_names():
        raise ValueError(f"unknown schedule {name!r}; known: {', '.join(_schedule_names())}")
    betas = BETAS[name.removesuffix(ZERO_SNR)]()
    return Schedule(zero_terminal_snr(betas) if name.endswith(ZERO_SNR) else betas)


def _schedule_names() -> list[str]:
    return [name + suffix for suffix in ("", ZERO_SNR) for name in BETAS]


def _styles(labels: Iterable[str]) -> dict[str, dict[str, Any]]:
    """One colour per schedule. Its zero-SNR variant is darker, thin and dashed, to be seen where the two coincide."""
    from matplotlib.colors import to_rgb

    families = list(dict.fromkeys(label.removesuffix(ZERO_SNR) for label in labels))
    styles = {}
    for label in labels:
        turn, color = divmod(families.index(label.removesuffix(ZERO_SNR)), len(COLORS))
        if label.endswith(ZERO_SNR):
            darker = tuple(0.55 * c for c in to_rgb(COLORS[color]))
            styles[label] = {"color": darker, "linestyle": DASHES[turn % 3], "linewidth": 1.4, "zorder": 3}
        else:
            styles[label] = {"color": COLORS[color], "linestyle": LINES[turn % 3], "linewidth": 2.2}
    return styles
