"""No guidance until the unguided trajectory has left the attraction basin of a training image, as || d || says.

Jain, Kobayashi, Shibuya, Takida, Memon, Togelius, Mitsufuji, "Classifier-Free Guidance inside the Attraction Basin May
Cause Memorization", CVPR 2025: guidance is switched on at the first local minimum of || d ||. Deviation: as in
static_transition.py, which has the fixed point.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from local_sd_pipeline import NoisePrediction
from memorization.mitigations.base import MITIGATIONS, Mitigation
from memorization.mitigations.case import Case, Remedy
from memorization.models.generation import Guide
from memorization.settings import Count


@MITIGATIONS.register
@dataclass(frozen=True)
class DynamicTransition(Mitigation):
    """``dynamic_transition``. ``strength``: for how many steps in a row || d || must lie above its minimum so far."""

    strength: Count = 1

    name: ClassVar[str] = "dynamic_transition"
    strengths: ClassVar[tuple[float, ...]] = (1, 2, 3, 4, 5)

    def __call__(self, case: Case) -> Remedy:
        return Remedy.unchanged(case, guide=lambda rows: self._guide(case.guidance_scale))

    def _guide(self, scale: float) -> Guide:
        lowest: Tensor | None = None  # per row, so far
        rises = on = torch.zeros(())

        def guide(index: int, point: NoisePrediction) -> Tensor:
            nonlocal lowest, rises, on
            norm = point.guidance.flatten(1).norm(dim=1)
            if lowest is None:
                lowest, rises, on = norm, torch.zeros_like(norm), torch.zeros_like(norm, dtype=torch.bool)
            rises = torch.where(norm > lowest, rises + 1, torch.zeros_like(rises))
            lowest = torch.minimum(lowest, norm)
            on = on | (rises >= self.strength)
            return point.uncond + scale * on[:, None, None, None] * point.guidance

        return guide
