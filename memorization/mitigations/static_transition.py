"""No guidance until the trajectory has left the attraction basin of a training image.

Jain, Kobayashi, Shibuya, Takida, Memon, Togelius, Mitsufuji, "Classifier-Free Guidance inside the Attraction Basin May
Cause Memorization", CVPR 2025: guidance is switched on at a transition point, fixed (here; t = 500 or 650)
or found (dynamic_transition.py).

Before the point the public code takes the guidance scale 0, the unconditional prediction, or -2 ("opposite guidance",
with t = 650); ``before`` takes any.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from torch import Tensor

from local_sd_pipeline import NoisePrediction
from memorization.mitigations.base import MITIGATIONS, Mitigation
from memorization.mitigations.case import Case, Remedy
from memorization.settings import Bounds


@MITIGATIONS.register
@dataclass(frozen=True)
class StaticTransition(Mitigation):
    """``static_transition``.

    Args:
        strength: the timestep below which guidance acts.
        before: guidance scale above it.
    """

    strength: Annotated[float, Bounds(0, 1000)] = 650
    before: float = 0.0

    name: ClassVar[str] = "static_transition"
    strengths: ClassVar[tuple[float, ...]] = (900, 800, 650, 500, 350)

    def __call__(self, case: Case) -> Remedy:
        def guide(index: int, point: NoisePrediction) -> Tensor:
            scale = case.guidance_scale if point.timestep < self.strength else self.before
            return point.uncond + scale * point.guidance

        return Remedy.unchanged(case, guide=lambda rows: guide)
