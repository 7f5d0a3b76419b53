"""Nearness of a picture to its nearest training picture as AMG defines it, differentiable in the picture.

Chen, Liu, Xu, CVPR 2024, equations 8 and 9, with n_0 the nearest of an index and z its k = 50 nearest:

    pixels, latents
                 sigma = - l2(x, n_0) / (alpha * mean over z of l2(x, z)),   alpha = .5
    SSCD, CLIP   sigma = E(x)^T E(n_0)

Larger is nearer. The neighbours are held constant in the gradient.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from memorization.index import SIZED, Index


@dataclass(frozen=True)
class Nearest:
    """Nearness to the pictures of ``index``.

    Args:
        of_latents: whether it is asked about latents instead of pictures, for an index of latents: then neither
            decoder nor encoder is needed.
    """

    index: Index
    k: int = 50
    alpha: float = 0.5
    of_latents: bool = False

    @property
    def measure(self) -> str:
        """``nl2``, or ``sscd`` or ``clip`` for a cosine of features."""
        return "nl2" if self.index.kind in SIZED else self.index.kind

    def describe(self, pictures: Tensor) -> Tensor:
        """Features ``(n, width)`` of pictures ``(n, 3, h, w)`` in [-1, 1], on their device; differentiable."""
        described = pictures.flatten(1) if self.of_latents else self.index.describe(pictures)
        return described.to(pictures.device)

    @torch.no_grad()
    def find(self, features: Tensor) -> Tensor:
        """Rows of the ``k`` nearest, nearest first, ``(n, k)``, of what :meth:`describe` gave."""
        return self.index.search(features, self.k)[1]

    def nearness(self, features: Tensor, rows: Tensor) -> Tensor:
        """sigma ``(n,)`` of what :meth:`describe` gave, and the rows of its neighbours; differentiable."""
        if self.measure != "nl2":
            return (features * self.index.vectors(rows[:, 0].tolist()).to(features)).sum(1)
        z = self.index.vectors(rows.flatten().tolist()).to(features).unflatten(0, rows.shape)
        distance = (features[:, None] - z).square().mean(2).clamp_min(1e-12).sqrt()  # l2 * 2; the factor cancels
        return -distance[:, 0] / (self.alpha * distance.mean(1))
