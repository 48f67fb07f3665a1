"""Plot DDPM and DDIM under two noise schedules: 1,500 points from noise to two moons.

No network: the data are points, so that the exact ε is known in closed form (a mixture of Gaussians), and the figure
shows the samplers and the schedules alone.

    python scripts/draw_samplers.py [OUT.png]
"""

import argparse
import math

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from minisd import Schedule, cosine_betas, linear_betas, samplers

SPREAD = 0.03  # standard deviation of each data point


def two_moons(n: int = 300) -> Tensor:
    """Points 'n 2' on two interleaved half circles, of unit variance."""
    angle = torch.linspace(0, math.pi, n // 2, dtype=torch.float64)
    upper = torch.stack([angle.cos(), angle.sin()], dim=-1)
    lower = torch.stack([1 - angle.cos(), 0.5 - angle.sin()], dim=-1)
    points = torch.cat([upper, lower])
    return (points - points.mean(0)) / points.std(0)


def exact_model(data: Tensor, schedule: Schedule):
    """ε(x_t, t) = -√(1-ᾱ) ∇ log p(x_t), for x_0 one of the data points plus a little Gaussian noise."""

    def model(x_t: Tensor, t: int) -> Tensor:
        abar = schedule.alpha_cumprod(t)
        variance = 1 - abar + abar * SPREAD**2
        difference = x_t[:, None] - abar.sqrt() * data
        weight = (-difference.square().sum(-1) / (2 * variance)).softmax(dim=1)
        return (1 - abar).sqrt() * (weight[..., None] * difference).sum(1) / variance

    return model


def main(out: str) -> None:
    data = two_moons()
    schedules = {"linear": Schedule(linear_betas()), "cosine": Schedule(cosine_betas())}
    runs = {"DDPM, 1000 steps": (samplers.ddpm, 1000), "DDIM, 50 steps": (samplers.ddim, 50)}
    share = (0.0, 0.5, 0.7, 0.8, 0.9, 1.0)  # of the steps taken

    figure = Figure(figsize=(10.2, 7.4), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.subplots(4, len(share))
    for row, ((label, (sampler, steps)), (name, schedule)) in enumerate(
        (s, b) for s in runs.items() for b in schedules.items()
    ):
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(1500, 2, generator=generator, dtype=torch.float64)
        frames, times = [x], [schedule.num_timesteps - 1]
        noise = lambda x, g=generator: torch.randn(x.shape, generator=g, dtype=x.dtype)  # noqa: E731
        timesteps = schedule.timesteps(steps, "trailing")
        for step in sampler(exact_model(data, schedule), x, schedule, timesteps, noise=noise):
            frames.append(step.x)
            times.append(0 if step.t_prev is None else step.t_prev)
        for column, part in enumerate(share):
            axis, taken = axes[row, column], round(part * steps)
            axis.scatter(*data.T, s=1, color="#d95f02", alpha=0.25, linewidths=0)
            axis.scatter(*frames[taken].T, s=1.2, color="#1b4f72", alpha=0.6, linewidths=0)
            axis.set(xlim=(-3, 3), ylim=(-3, 3), xticks=[], yticks=[], aspect="equal")
            axis.set_title(f"t = {times[taken]}" if part < 1 else "sample", fontsize=9)
            if column == 0:
                axis.set_ylabel(f"{label}\n{name} β", fontsize=9)
    figure.savefig(out, dpi=110)
    print(out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", nargs="?", default="scripts/figures/samplers.png", help="figure to write [%(default)s]")
    main(parser.parse_args().out)
