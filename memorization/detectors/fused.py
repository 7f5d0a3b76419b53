"""Two features of one trace, chosen on the testbed. Ours.

    || d(x_T, t=981) ||_2  +  373 * (1 - cos(eps_c, eps_u))(x_T, t=781)

on pure noise: how hard the prompt pulls at the noisiest step, and how far it turns the prediction a fifth of the way
on. It costs what the anisotropy score costs. Both features, both timesteps and the weight are the pair with the best
out-of-fold AUC among 2,556 on testbed-eps's validation half (memorization/studies/fusion.py). docs/results/detection.md
says what they give on its other half and on testbed-v, which had no part in the choice. Nothing is known of other
models.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from memorization.detectors.base import DETECTORS, PromptDetector
from memorization.detectors.features import features

if TYPE_CHECKING:
    from local_sd_pipeline import NoisePrediction


@DETECTORS.register
@dataclass(frozen=True)
class Fused(PromptDetector):
    """``fused``: values ``(prompts, noises)``, at least 0, higher means memorized."""

    turn_weight: float = 373.0

    name: ClassVar[str] = "fused"
    steps: ClassVar[tuple[int, ...]] = (0, 10)
    terms: ClassVar[tuple[str, ...]] = ("fused",)

    def __call__(self, trace: list[NoisePrediction]) -> dict[str, Tensor]:
        high, lower = (features(point) for point in trace)
        return {"fused": high["norm"] + self.turn_weight * lower["turn"]}
