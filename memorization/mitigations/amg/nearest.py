"""Nearness of a picture to its nearest training picture as AMG defines it, differentiable in the picture.

Chen, Liu, Xu, CVPR 2024, equations 8 and 9, with n_0 the nearest of an index and z its k = 50 nearest:

    pixels, latents
                 sigma = - l2(x, n_0) / (alpha * mean over z of l2(x, z)),   alpha = .5
    SSCD, CLIP   sigma = E(x)^T E(n_0)

Larger is nearer. The neighbours are held constant in the gradient. Latents and CLIP are not in the paper.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from memorization.index.kinds import SIZED
from memorization.index.store import Index
from memorization.similarity.nl2 import NEIGHBOURS, normalized_l2_to_nearest


@dataclass(frozen=True)
class Nearest:
    """Nearness to the pictures of ``index``."""

    index: Index
    k: int = NEIGHBOURS

    @property
    def measure(self) -> str:
        """``nl2``, or ``sscd`` or ``clip`` for a cosine of features."""
        return "nl2" if self.index.kind in SIZED else self.index.kind

    @torch.no_grad()
    def find(self, features: Tensor) -> Tensor:
        """Rows of the ``k`` nearest, nearest first, ``(n, k)``, of ``features (n, width)``, made by the index."""
        return self.index.search(features, self.k)[1]

    def nearness(self, features: Tensor, rows: Tensor) -> Tensor:
        """sigma ``(n,)`` of ``features``, and the rows of their neighbours; differentiable."""
        if self.measure != "nl2":
            return (features * self.index.vectors(rows[:, 0].tolist()).to(features)).sum(1)
        neighbours = self.index.vectors(rows.flatten().tolist()).to(features).unflatten(0, rows.shape)
        return -normalized_l2_to_nearest(features, neighbours)
