"""Figures to study by: noise schedules, the forward process, denoising trajectories, cross-attention maps.

Every `plot_…` writes one file (PNG, PDF or SVG by its suffix) and returns its path; the `…_figure` beside it returns
the matplotlib Figure, to be changed or shown in a notebook. matplotlib comes with `pip install 'minisd[plot]'`; its
global state (pyplot, rcParams) is not touched.
"""

from minisd.plots.attention import attention_figure, plot_attention
from minisd.plots.schedules import named_schedules, plot_schedules, schedules_figure
from minisd.plots.strips import noising_figure, plot_noising, plot_trajectory, trajectory_figure

__all__ = [
    "attention_figure",
    "named_schedules",
    "noising_figure",
    "plot_attention",
    "plot_noising",
    "plot_schedules",
    "plot_trajectory",
    "schedules_figure",
    "trajectory_figure",
]
