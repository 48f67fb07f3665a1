"""How near a picture is to another, pixel by pixel and structure by structure."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

SIGMA, SIDE = 1.5, 11  # of SSIM's Gaussian window
K1, K2 = 0.01, 0.03  # keep its quotients finite where a window is flat


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB, 'b', of images 'b c h w' in [-1, 1]: 10·log₁₀(2² / mean squared error).

    Infinite for equal pictures. The mean over pictures is the mean of these, in dB. Measure what one would see: both
    rounded to 8 bits (`quantized`).
    """
    _check(a, b)
    error = (a.double() - b.double()).square().flatten(1).mean(1)
    return 10 * torch.log10(4 / error)


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Structural similarity, 'b', of images 'b c h w' in [-1, 1] (Wang et al. 2004, eq. 13), 1 for equal pictures.

    Gaussian window of 11 pixels and σ = 1.5, K₁ = 0.01, K₂ = 0.03, only where the whole window lies inside the picture;
    mean over channels and places. Variances are those of the window's weights, without Bessel's correction.
    """
    _check(a, b)
    if min(a.shape[-2:]) < SIDE:
        raise ValueError(f"SSIM looks through a window of {SIDE} pixels; the pictures have {a.shape[-2]}×{a.shape[-1]}")
    x, y = a.double(), b.double()
    mean_x, mean_y = _windowed(x), _windowed(y)
    variance_x = _windowed(x * x) - mean_x**2
    variance_y = _windowed(y * y) - mean_y**2
    covariance = _windowed(x * y) - mean_x * mean_y
    # the formula is for values from 0 up: in means, not in variances, [-1, 1] is a shift by 1
    mean_x, mean_y, c1, c2 = mean_x + 1, mean_y + 1, (K1 * 2) ** 2, (K2 * 2) ** 2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    structure = (2 * covariance + c2) / (variance_x + variance_y + c2)
    return (luminance * structure).flatten(1).mean(1)


def _windowed(x: Tensor) -> Tensor:
    """The weighted mean under every window that lies wholly inside."""
    offset = torch.arange(SIDE, dtype=x.dtype, device=x.device) - SIDE // 2
    weights = torch.exp(-(offset**2) / (2 * SIGMA**2))
    weights = (weights / weights.sum()).expand(x.shape[1], 1, 1, SIDE)
    x = F.conv2d(x, weights, groups=x.shape[1])
    return F.conv2d(x, weights.transpose(2, 3), groups=x.shape[1])


def quantized(images: Tensor) -> Tensor:
    """Images in about [-1, 1] as their 8-bit files show them, in [-1, 1] again."""
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1


def _check(a: Tensor, b: Tensor) -> None:
    if a.shape != b.shape or a.ndim != 4:
        raise ValueError(f"pictures of {tuple(a.shape)} and {tuple(b.shape)}: give two batches 'b c h w' of one shape")
