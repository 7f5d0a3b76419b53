"""How fast a generation moves and how large its guess is, against runs that are known not to be memorized.

"Broken Memories", 2026: z-scores of || x_t - x_{t+1} || and || x0_hat ||, against non-memorized generations. A
generation is flagged at the first step at which both lie beyond 3. Its score is

    max over steps of min(|z_update|, |z_x0|)

which is above 3 where, and only where, the rule finds such a step.

Both norms are kept at every ``every``-th step, as curves beside the scores; ``detect_eval.py`` makes z-scores of
them with the mean and spread of the validation half's non-memorized prompts (memorization/evaluation/learned.py). So
the detector has no value of its own until it is evaluated with labels.

Deviation: the curves are thinned out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from memorization.detectors.base import DETECTORS, GenerationDetector
from memorization.settings import Count

if TYPE_CHECKING:
    from memorization.models.generation import Step
    from memorization.models.predictor import Predictor


@DETECTORS.register
@dataclass(frozen=True)
class TrajectoryZ(GenerationDetector):
    """Curves ``update_norm`` and ``x0_norm``: ``(rows, kept steps)``.

    Args:
        every: steps from one kept value to the next.
    """

    every: Count = 5

    name: ClassVar[str] = "trajectory_z"
    curves: ClassVar[tuple[str, ...]] = ("update_norm", "x0_norm")

    def reads(self, steps: int) -> dict[str, int]:
        return dict.fromkeys(self.curves, range(0, steps, self.every)[-1] + 1)

    def reduce(self, step: Step, predict: Predictor) -> Tensor:
        moved = (step.after - step.prediction.latents).flatten(1).norm(dim=1)
        return torch.stack([moved, step.x0.flatten(1).norm(dim=1)], dim=1)

    def __call__(self, kept: Tensor) -> dict[str, Tensor]:
        moved, clean = kept[:: self.every].unbind(-1)
        return {"update_norm": moved.T, "x0_norm": clean.T}
