"""Distance between pure noise and the picture that one denoising step makes of it.

Webster, "A Reproducible Extraction of Training Images from Diffusion Models", 2023: memorized prompts denoise at once.

    || x0_hat(x_T) - x_T ||_2 / sqrt(d),   x0_hat = (x_T - sigma eps_c) / alpha at t = 981

Deviation: in the latents, where the paper compares decoded pictures; root mean square, so that it does not grow with
the picture's size; conditional prediction without guidance.
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
class OneStepDenoising(PromptDetector):
    """``one_step``: values ``(prompts, noises)``, at least 0, higher means memorized."""

    name: ClassVar[str] = "one_step"
    steps: ClassVar[tuple[int, ...]] = (0,)
    terms: ClassVar[tuple[str, ...]] = ("one_step",)

    def __call__(self, trace: list[NoisePrediction]) -> dict[str, Tensor]:
        (first,) = trace
        x0 = (first.latents - first.sigma * first.cond) / first.alpha
        return {"one_step": (x0 - first.latents).flatten(2).square().mean(2).sqrt()}
