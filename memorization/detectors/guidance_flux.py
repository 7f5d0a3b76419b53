"""Flux of the guidance vector through a sphere, along a generation.

A follow-up of p-Laplace detection (see memorization/detectors/p_laplace.py): the boundary estimator at p = 1, on the
field d = eps_c - eps_u instead of the score,

    - E_n[ cos( -d(alpha_t x0_hat + R n), n ) ],   R = sigma_t sqrt(dim)

averaged over steps of a generation. -d points to where the prompt pulls: it converges on a memorized picture.

Deviation: every tenth step, where the follow-up takes all; the mean cosine without the factor dim / R, which would
weigh the steps by their noise. Of a flow d is the difference of velocities, which has the direction of that of eps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from memorization.detectors.base import DETECTORS, GenerationDetector
from memorization.detectors.laplacian import boundary
from memorization.settings import Count, Seed

if TYPE_CHECKING:
    from memorization.models.generation import Step
    from memorization.models.predictor import Predictor


@DETECTORS.register
@dataclass(frozen=True)
class GuidanceFlux(GenerationDetector):
    """``guidance_flux``: values ``(rows,)`` in [-1, 1], higher means memorized.

    Args:
        every: steps from one estimate to the next.
        points: on each sphere.
        seed: of the points.
    """

    every: Count = 10
    points: Count = 2
    seed: Seed = 0

    name: ClassVar[str] = "guidance_flux"
    terms: ClassVar[tuple[str, ...]] = ("guidance_flux",)

    def reads(self, steps: int) -> dict[str, int]:
        return {"guidance_flux": range(0, steps, self.every)[-1] + 1}

    def reduce(self, step: Step, predict: Predictor) -> Tensor:
        t, dimension = step.prediction.timestep, step.x0[0].numel()
        if step.index % self.every:
            return step.x0.new_full((len(step.x0),), torch.nan)
        radius = step.prediction.sigma * dimension**0.5
        flux = boundary(
            lambda y: predict.raw(y, t, cond=False) - predict.raw(y, t), step.prediction.alpha * step.x0, radius, [1.0],
            points=self.points, generator=torch.Generator().manual_seed(self.seed), batch_size=self.points,
        ).value[0]  # fmt: skip
        return -flux * radius / dimension

    def __call__(self, kept: Tensor) -> dict[str, Tensor]:
        return {"guidance_flux": kept[:: self.every].mean(0)}
