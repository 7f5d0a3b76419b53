"""Normalised l2 of AMG (Chen, Liu, Xu, CVPR 2024, arXiv 2404.00922, eq. 8), the one place that computes it.

    nL2(x, n) = l2(x, n) / (alpha * mean of l2(x, z) over the k training pictures z nearest to x),  k = 50, alpha = .5

l2 is the root mean square difference / 2 of pixels in [-1, 1]; the factor cancels. 0 is an exact copy, 2 is as near as
any of the k; the paper calls values below 1.4 a copy. Deviation: the sign is the distance's (lower = nearer).
"""

from __future__ import annotations

import torch
from torch import Tensor

NEIGHBOURS, ALPHA = 50, 0.5  # k and alpha
CHUNK = 2**24  # numbers of the training pictures that are in double precision at once


def l2(pictures: Tensor, training: Tensor) -> Tensor:
    """Root mean square difference / 2, ``(pictures, training)``, of ``(n, c, h, w)`` in [-1, 1].

    ``training`` may be uint8 too, which saves memory where there are many.
    """
    left = pictures.flatten(1).double()
    rows = training.flatten(1).split(max(1, CHUNK // left.shape[1]))
    units = (row.float() / 127.5 - 1 if row.dtype == torch.uint8 else row for row in rows)
    chunks = [torch.cdist(left, unit.double()) for unit in units]
    return (torch.cat(chunks, dim=1) / (2 * left.shape[1] ** 0.5)).float()


def normalized_l2(pictures: Tensor, training: Tensor, k: int = NEIGHBOURS, alpha: float = ALPHA) -> Tensor:
    """nL2 of every picture to every training picture, ``(pictures, training)``, at least 0."""
    distance = l2(pictures, training)
    return normalized(distance, distance.topk(min(k, len(training)), largest=False).values, alpha)


def normalized_l2_to_nearest(pictures: Tensor, neighbours: Tensor, alpha: float = ALPHA) -> Tensor:
    """nL2 of every picture ``(n, width)`` to the first of its own ``neighbours (n, k, width)``; differentiable.

    The neighbours are its nearest training pictures, nearest first, and held constant.
    """
    square = (pictures[:, None] - neighbours).square().mean(2)
    distance = square.clamp_min(1e-12).sqrt() / 2  # a root has no gradient at 0
    return normalized(distance[:, :1], distance, alpha)[:, 0]


def normalized(distance: Tensor, nearest: Tensor, alpha: float = ALPHA) -> Tensor:
    """The formula: ``distance (n, m)`` by ``alpha`` times the mean of the distances ``nearest (n, k)``."""
    return distance / (alpha * nearest.mean(dim=1, keepdim=True)).clamp_min(1e-12)
