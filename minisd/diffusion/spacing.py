"""Which timesteps a sampler visits: integers of a training schedule, and σ schedules.

Integer spacings return descending lists of Python ints. σ schedules are descending float64 tensors without the
trailing 0, which is no timestep; `schedule.t_from_sigma(sigmas).tolist()` gives the fractional t a sampler takes.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def timesteps(T: int, n: int, spacing: str = "leading", offset: int = 1) -> list[int]:
    """n distinct timesteps in [0, T), descending, for every 1 <= n <= T (except "compvis" and "compvis-quad").

    "leading": i·⌊T/n⌋ + offset (Stable Diffusion's, with offset 1), the offset reduced where the last would reach T.
    "trailing": from T-1 down in strides of T/n (Lin et al. 2023, table 2). "linspace": from T-1 to 0.
    "compvis", "compvis-quad": what the original code runs: another number of steps than n where n does not divide T,
    a ValueError where it would index T, and repeated first steps of "compvis-quad" from n = 30 on.
    offset belongs to "leading" alone.
    """
    if not 1 <= n <= T:
        raise ValueError(f"{n} steps were asked of a schedule of {T}: give 1 to {T}")
    if spacing == "leading":
        if not 0 <= offset < T:
            raise ValueError(f"offset is {offset}: give 0 to {T - 1}")
        stride = T // n
        offset = min(offset, T - 1 - (n - 1) * stride)
        return [i * stride + offset for i in reversed(range(n))]
    if spacing == "trailing":
        stride = T - (T - T / n)  # T/n as numpy.arange rounds it: halves fall to the side they fall to in diffusers
        return [round(T - i * stride) - 1 for i in range(n)]
    if spacing == "linspace":
        return [round(i * ((T - 1) / (n - 1))) for i in reversed(range(n))] if n > 1 else [T - 1]
    if spacing == "compvis":
        if not _compvis_runs(T, n):
            near = sorted(sorted((m for m in range(1, T + 1) if _compvis_runs(T, m)), key=lambda m: abs(m - n))[:4])
            raise ValueError(
                f"the original code cannot run {n} steps: it would visit step {T} of a schedule that ends at {T - 1}; "
                f"use {', '.join(map(str, near))} steps, or another spacing"
            )
        return [i + 1 for i in reversed(range(0, T, T // n))]
    if spacing == "compvis-quad":
        return [int(root**2) + 1 for root in _linspace(math.sqrt(0.8 * T), 0.0, n)]
    raise ValueError(f"unknown spacing {spacing!r}; known: leading, trailing, linspace, compvis, compvis-quad")


def _compvis_runs(T: int, n: int) -> bool:
    return range(0, T, T // n)[-1] + 1 < T


def space_timesteps(T: int, counts: str | Sequence[int]) -> list[int]:
    """Improved DDPM's respacing: the steps kept of a chain of T, ascending (Nichol & Dhariwal 2021, section 4).

    counts: how many steps to keep of each of len(counts) sections of about equal length, spread evenly with both ends
    of a section included; "10,15,20" is the same as [10, 15, 20], and "250" is one section. "ddim50": exactly 50 steps
    at a whole stride from 0.
    """
    if isinstance(counts, str) and counts.startswith("ddim"):
        count = int(counts[len("ddim") :])
        for stride in range(1, T):
            if len(range(0, T, stride)) == count:
                return list(range(0, T, stride))
        raise ValueError(f"no whole stride gives {count} of {T} steps; give the number alone for an uneven spacing")
    if isinstance(counts, str):
        counts = [int(count) for count in counts.split(",")]
    kept, start = [], 0
    for section, count in enumerate(counts):
        length = T // len(counts) + (section < T % len(counts))
        if not 1 <= count <= length:
            raise ValueError(f"{count} steps were asked of a section of {length}: give 1 to {length}")
        stride = (length - 1) / (count - 1) if count > 1 else 1
        position = 0.0
        for _ in range(count):
            kept.append(start + round(position))
            position += stride  # summed, as the original does: the products round differently
        start += length
    return kept


def karras_sigmas(n: int, sigma_min: float, sigma_max: float, rho: float = 7.0) -> Tensor:
    """n σ, descending, equally spaced in σ^(1/ρ) (Karras et al. 2022, eq. 5)."""
    ramp = torch.linspace(sigma_max ** (1 / rho), sigma_min ** (1 / rho), n, dtype=torch.float64)
    return ramp**rho


def polyexponential_sigmas(n: int, sigma_min: float, sigma_max: float, rho: float = 1.0) -> Tensor:
    """n σ, descending; log σ falls as the ρ-th power of a ramp from 1 to 0. ρ = 1 is the exponential schedule."""
    ramp = torch.linspace(1, 0, n, dtype=torch.float64) ** rho
    return sigma_min * (sigma_max / sigma_min) ** ramp


def _linspace(start: float, end: float, n: int) -> list[float]:
    return torch.linspace(start, end, n, dtype=torch.float64).tolist()
