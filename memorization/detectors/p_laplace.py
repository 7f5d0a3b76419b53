"""p-Laplacian of the log density round a picture: strongly negative on the sharp peak of a memorized one.

Brokman et al., "Identifying Memorization of Diffusion Models through p-Laplace Analysis", SSVM 2025 (arXiv 2505.08246).
z0 the picture's scaled latents, t = 10, the centre alpha z0, the radius sigma sqrt(d), the score -eps / sigma:

    - d / R * E_n[ |s|^(p-2) s . n ],   s at alpha z0 + R n   (see laplacian.py for the estimator)

The sign makes higher mean memorized. It needs a picture, not a prompt: the end of the shared generation, or a picture
of the user's. ``p_laplace`` is without the prompt, ``p_laplace_prompt`` with it.

Deviation: for generated pictures z0 is the end of the generation, not decoded and encoded again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from memorization.detectors.base import DETECTORS, ImageDetector
from memorization.detectors.laplacian import boundary
from memorization.settings import Count, Positive, Seed, Timestep

if TYPE_CHECKING:
    from memorization.models.predictor import Predictor


@DETECTORS.register
@dataclass(frozen=True)
class PLaplace(ImageDetector):
    """``p_laplace`` with its term ``p_laplace_prompt``: values ``(rows,)``, higher means memorized.

    Args:
        power: the p.
        timestep: the noise level.
        points: on the sphere.
        seed: of the points, the same for every picture.
    """

    power: Positive = 1.0
    timestep: Timestep = 10
    points: Count = 64
    seed: Seed = 0

    name: ClassVar[str] = "p_laplace"
    terms: ClassVar[tuple[str, ...]] = ("p_laplace", "p_laplace_prompt")

    def __call__(self, clean: Tensor, predict: Predictor) -> dict[str, Tensor]:
        """From clean latents ``(rows, c, h, w)``."""
        alpha, sigma = predict.noise_scales(self.timestep)
        radius = sigma * clean[0].numel() ** 0.5

        def flux(cond: bool) -> Tensor:
            return -boundary(
                lambda x: -predict(x, self.timestep, cond) / sigma, alpha * clean, radius, [self.power],
                points=self.points, generator=torch.Generator().manual_seed(self.seed), batch_size=self.points,
            ).value[0]  # fmt: skip

        return {"p_laplace": flux(cond=False), "p_laplace_prompt": flux(cond=True)}
