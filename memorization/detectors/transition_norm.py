"""Norm of the guidance vector at the transition point.

Jain, Kobayashi, Shibuya, Takida, Memon, Togelius, Mitsufuji, "Classifier-Free Guidance inside the Attraction Basin May
Cause Memorization", CVPR 2025. The dynamic transition point is the first local minimum of || eps_c - eps_u || along the
steps, lower than the step before it and the step after it; memorized prompts pull hard until then. The paper uses the
point to switch guidance on; its height detects too.

Deviation: read off a generation that is guided throughout, which all trajectory detectors share. In the paper there is
no guidance before the point (see memorization/mitigations/dynamic_transition.py for what its code does).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from memorization.detectors.base import DETECTORS, GenerationDetector

if TYPE_CHECKING:
    from memorization.models.generation import Step
    from memorization.models.predictor import Predictor


def transition_point(norms: Tensor) -> Tensor:
    """Index of the first local minimum along dim 0 of ``(steps, rows)``, the last step where there is none.

    A minimum has a higher neighbour on both sides: the first step is none, though the norm may rise from it.
    """
    turns = torch.zeros_like(norms, dtype=torch.bool)
    turns[-1] = True
    turns[1:-1] = (norms[1:-1] < norms[:-2]) & (norms[1:-1] < norms[2:])
    return turns.int().argmax(0)


@DETECTORS.register
@dataclass(frozen=True)
class Transition(GenerationDetector):
    """``transition_norm``: values ``(rows,)``, at least 0, higher means memorized."""

    name: ClassVar[str] = "transition_norm"
    terms: ClassVar[tuple[str, ...]] = ("transition_norm",)

    def reduce(self, step: Step, predict: Predictor) -> Tensor:
        return step.prediction.norm

    def __call__(self, kept: Tensor) -> dict[str, Tensor]:
        return {"transition_norm": kept.gather(0, transition_point(kept)[None])[0]}
