"""Is the right one among the nearest: by a prompt's embedding, or by what a picture looks like from afar."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor

THUMBNAIL = 16  # pixels a side, of the judge that looks from afar


def ranks(similarity: Tensor, right: Tensor) -> Tensor:
    """How many wrong entries are as similar to a query as its most similar right one, 'q'; 0: it is found first.

    similarity 'q g'; right 'q g', bool. Ties count against the right one, so that what makes all entries alike finds
    nothing. ValueError where a query has no right entry, or a similarity is NaN.
    """
    if similarity.shape != right.shape or similarity.ndim != 2:
        raise ValueError(f"similarities {tuple(similarity.shape)} and answers {tuple(right.shape)} differ in shape")
    if not right.any(1).all():
        raise ValueError(f"{int((~right.any(1)).sum())} of {len(right)} queries have no right answer in the gallery")
    if similarity.isnan().any():
        raise ValueError("a similarity is NaN: nothing can be ranked by it")
    best = similarity.masked_fill(~right, -math.inf).amax(1, keepdim=True)
    return ((similarity >= best) & ~right).sum(1)


def found(similarity: Tensor, right: Tensor, k: int) -> Tensor:
    """Whether one of the k most similar entries is a right one, 'q', 1.0 or 0.0."""
    return (ranks(similarity, right) < k).double()


def chance(k: int, right: int, gallery: int) -> float:
    """The probability that k entries drawn blindly hold one of the right ones."""
    return 1 - math.comb(gallery - right, k) / math.comb(gallery, k)


def thumbnails(images: Tensor) -> Tensor:
    """Pictures 'b 3 h w' as 16 × 16 means, less each picture's own mean, 'b 768' of length 1: cosines compare them.

    No network has a part in it, so it favours none; it sees shapes and colours where they stand, and no more.
    """
    small = F.adaptive_avg_pool2d(images.float(), THUMBNAIL).flatten(1)
    return F.normalize(small - small.mean(1, keepdim=True), dim=1)
