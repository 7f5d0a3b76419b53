"""How much one denoising step takes away from pure noise.

Webster, "A Reproducible Extraction of Training Images from Diffusion Models", 2023: the mean square difference between
the start latent and the x0_hat that one step makes of it; memorized prompts denoise at once. The start latent x is
scaled by sigma_max = sigma / alpha, as samplers without a shrinking mean have it, so x0_hat = x - sigma_max eps_c and

    mean((x0_hat - x)^2) = (sigma / alpha)^2 mean(eps_c^2)   at t = 981

Deviation: conditional prediction without guidance, x_T itself going into the UNet. A flow's latents are scaled by no
sigma_max (alpha is 0 at its first step): there it is the mean square of x0_hat - x, which is that of its output.
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
        factor = first.sigma if first.prediction_type == "flow" else first.sigma / first.alpha
        return {"one_step": factor**2 * first.cond.flatten(2).square().mean(2)}
