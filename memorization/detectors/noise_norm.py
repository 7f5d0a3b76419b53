"""Norm of the guidance vector at the first step.

Wen, Liu, Chen, Lyu, "Detecting, Explaining, and Mitigating Memorization in Diffusion Models", ICLR 2024 (first step).

    || eps_c(x_T, t) - eps_u(x_T, t) ||_2,  t = 981 of the 50-step DDIM grid

Deviation: none for epsilon models. For v-prediction and sample checkpoints the outputs are turned into eps first, so
that the norm means the same thing everywhere. At the first step of a flow eps is x_T whatever the model says, so of a
flow it is D = || x0_c - x0_u || / sqrt(d): at a fixed timestep of other models D is the norm times a constant.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from memorization.detectors.base import DETECTORS, PromptDetector

if TYPE_CHECKING:
    from local_sd_pipeline import NoisePrediction


@DETECTORS.register
@dataclass(frozen=True)
class NoiseNorm(PromptDetector):
    """``noise_norm``: values ``(prompts, noises)``, at least 0, higher means memorized."""

    name: ClassVar[str] = "noise_norm"
    steps: ClassVar[tuple[int, ...]] = (0,)
    terms: ClassVar[tuple[str, ...]] = ("noise_norm",)

    def __call__(self, trace: list[NoisePrediction]) -> dict[str, Tensor]:
        (first,) = trace
        return {"noise_norm": first.norm}
