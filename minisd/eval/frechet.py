"""How far apart two sets of pictures are: the Fréchet distance of their features."""

from __future__ import annotations

import torch
from torch import Tensor


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """|μ_a - μ_b|² + tr(Σ_a + Σ_b - 2·(Σ_a·Σ_b)^½) of the normal distributions fitted to features 'n d' and 'm d'.

    Dowson & Landau 1982, eq. 4; with features of Inception-v3 it is the FID of Heusel et al. 2017, eq. 6. In float64.
    The root is that of the symmetric Σ_a^½·Σ_b·Σ_a^½, which has the same trace and needs no complex numbers.

    What the number depends on must stand beside it: the features and their resizing, the reference set, and n and m:
    it is biased upwards by about 1/n, so that only equal sizes compare (Chong & Forsyth 2020). ValueError for fewer
    than two rows, for rows of other widths, and for NaN.
    """
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise ValueError(f"features of {tuple(a.shape)} and {tuple(b.shape)}: give 'n d' and 'm d' of one width")
    if min(len(a), len(b)) < 2:
        raise ValueError(f"sets of {len(a)} and {len(b)}: a covariance needs two pictures at least")
    for features in (a, b):
        if not features.isfinite().all():
            raise ValueError("the features hold NaN or infinity: no distance")
    a, b = a.double(), b.double()
    root = _root(torch.cov(a.T).reshape(a.shape[1], -1))
    covariance_b = torch.cov(b.T).reshape(b.shape[1], -1)
    inner = torch.linalg.eigvalsh(root @ covariance_b @ root).clamp(min=0).sqrt().sum()
    means = (a.mean(0) - b.mean(0)).square().sum()
    # rounding can leave a little less than nothing between equal sets
    return max((means + (root @ root).trace() + covariance_b.trace() - 2 * inner).item(), 0.0)


def _root(covariance: Tensor) -> Tensor:
    """The symmetric square root of a covariance; eigenvalues that rounding made negative are 0."""
    values, vectors = torch.linalg.eigh(covariance)
    return vectors * values.clamp(min=0).sqrt() @ vectors.T
