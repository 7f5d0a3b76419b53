"""No guidance until the trajectory has left the attraction basin of a training image.

Jain, Kobayashi, Shibuya, Takida, Memon, Togelius, Mitsufuji, "Classifier-Free Guidance inside the Attraction Basin May
Cause Memorization", CVPR 2025: guidance is switched on at a transition point, fixed (``static``, t = 500 or 650) or
found (``dynamic``): the first local minimum of || d || along the unguided trajectory.

Deviation: theirs follows the conditional prediction before the transition point in some experiments and the
unconditional one in others; here it is the unconditional one (scale 0).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from local_sd_pipeline import NoisePrediction
from memorization.mitigations.case import Case, Guide, Remedy


@dataclass(frozen=True)
class StaticTransition:
    """``static_transition``. ``strength``: the timestep below which guidance acts."""

    strength: float = 650

    name: ClassVar[str] = "static_transition"
    strengths: ClassVar[tuple[float, ...]] = (900, 800, 650, 500, 350)

    def __call__(self, case: Case) -> Remedy:
        def guide(index: int, point: NoisePrediction) -> Tensor:
            scale = case.guidance_scale if point.timestep < self.strength else 0.0
            return point.uncond + scale * point.guidance

        return Remedy.unchanged(case, guide=lambda rows: guide)


@dataclass(frozen=True)
class DynamicTransition:
    """``dynamic_transition``. ``strength``: for how many steps in a row || d || must lie above its minimum so far."""

    strength: float = 1

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
