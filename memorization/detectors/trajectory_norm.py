"""Norm of the guidance vector, averaged over the first K steps of a generation.

Wen, Liu, Chen, Lyu, "Detecting, Explaining, and Mitigating Memorization in Diffusion Models", ICLR 2024, eq. 4:

    1/K * sum over the first K steps of || eps_c(x_t, t) - eps_u(x_t, t) ||_2,   K = 1, 5, 50

along a DDIM generation of 50 steps at the model's guidance scale (theirs: 7.5). K = 1 is ``noise_norm``, which needs
no generation.

Deviation: none for epsilon models. For v-prediction and sample checkpoints the outputs are turned into eps first;
of a flow it is D at each step (noise_norm.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from memorization.detectors.base import DETECTORS, GenerationDetector

if TYPE_CHECKING:
    from memorization.models.generation import Step
    from memorization.models.predictor import Predictor


@DETECTORS.register
@dataclass(frozen=True)
class TrajectoryNorm(GenerationDetector):
    """``trajectory_norm`` (K = all steps) with its terms for K = 5 and 1: values ``(rows,)``, at least 0."""

    name: ClassVar[str] = "trajectory_norm"
    terms: ClassVar[tuple[str, ...]] = ("trajectory_norm", "trajectory_norm_5", "trajectory_norm_1")

    def reads(self, steps: int) -> dict[str, int]:
        return {"trajectory_norm_5": min(5, steps), "trajectory_norm_1": 1}

    def reduce(self, step: Step, predict: Predictor) -> Tensor:
        return step.prediction.norm

    def __call__(self, kept: Tensor) -> dict[str, Tensor]:
        return {"trajectory_norm": kept.mean(0), "trajectory_norm_5": kept[:5].mean(0), "trajectory_norm_1": kept[0]}
