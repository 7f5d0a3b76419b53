"""Little or no guidance until the trajectory has left the attraction basin of a training image, as || d || says.

Jain, Kobayashi, Shibuya, Takida, Memon, Togelius, Mitsufuji, "Classifier-Free Guidance inside the Attraction Basin May
Cause Memorization", CVPR 2025: guidance is switched on at the first local minimum of || d || along the steps, that is
at the first step whose norm lies above that of the step before, which lies below the one before it.

The public code takes the guidance scale 1 before the point, which is the conditional prediction; ``before=0`` takes the
unconditional one. A trajectory without a minimum, such as one whose norm only rises, is never guided, there and here.

Deviation: ``strength`` above 1 waits longer.
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
    """``dynamic_transition``.

    Args:
        strength: for how many steps in a row || d || must lie above its minimum so far; a minimum has a higher norm
            before it, so that a rise from the first step on is none.
        before: guidance scale until then.
    """

    strength: Count = 1
    before: float = 1.0

    name: ClassVar[str] = "dynamic_transition"
    strengths: ClassVar[tuple[float, ...]] = (1, 2, 3, 4, 5)

    def __call__(self, case: Case) -> Remedy:
        return Remedy.unchanged(case, guide=lambda rows: self._guide(case.guidance_scale))

    def _guide(self, scale: float) -> Guide:
        previous: Tensor | None = None  # norm of each row at the step before
        lowest = rises = on = torch.zeros(())

        def guide(index: int, point: NoisePrediction) -> Tensor:
            nonlocal previous, lowest, rises, on
            norm = point.norm
            if previous is None:
                previous, lowest = norm, torch.full_like(norm, torch.inf)
                rises, on = torch.zeros_like(norm), torch.zeros_like(norm, dtype=torch.bool)
            rises = torch.where(norm > lowest, rises + 1, torch.zeros_like(rises))
            lowest = torch.where(norm < previous, torch.minimum(lowest, norm), lowest)  # set by the first fall
            previous = norm
            on = on | (rises >= self.strength)
            return point.uncond + torch.where(on, scale, self.before)[:, None, None, None] * point.guidance

        return guide
