"""Sharpness of the log density along the guidance direction.

Jeon, Kim, Kim, No, "Understanding and Mitigating Memorization in Generative Models via Sharpness of Probability
Landscapes", ICML 2025. With the scores s = -eps / sigma_t on pure noise at t = 981 and v = s_c - s_u:

    || H_c v - H_u v ||_2,   H the Jacobian of each score (the Hessian of its log density)

``exact`` takes Jacobian-vector products in forward mode; ``difference`` the central difference
(s(x + h v) - s(x - h v)) / 2h with h |v| = ``step`` |x|, which needs no derivative.
``exact`` needs the UNet in the contiguous memory format.

Deviation: none for epsilon models; other prediction types are turned into eps first. Scores of a flow's first step do
not depend on the prompt; there v = x0_c - x0_u, H is the Jacobian of x0, and the norm is divided by sqrt(d).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from memorization.detectors.base import DETECTORS, GradientDetector
from memorization.settings import Positive

if TYPE_CHECKING:
    from local_sd_pipeline import NoisePrediction
    from memorization.models.predictor import Predictor


@DETECTORS.register
@dataclass(frozen=True)
class Sharpness(GradientDetector):
    """``sharpness``: values ``(prompts, noises)``, at least 0, higher means memorized.

    Args:
        method: ``exact`` or ``difference``.
        step: length of the difference's step, relative to the latents'; below float32 it drowns in rounding.
    """

    method: Literal["exact", "difference"] = "difference"
    step: Positive = 1e-3

    name: ClassVar[str] = "sharpness"
    steps: ClassVar[tuple[int, ...]] = (0,)
    terms: ClassVar[tuple[str, ...]] = ("sharpness",)

    @property
    def forward_mode(self) -> bool:
        return self.method == "exact"

    def __call__(self, trace: list[NoisePrediction], predict: Predictor) -> dict[str, Tensor]:
        (first,) = trace
        flow = first.prediction_type == "flow"
        divisor = 1 / first.sigma if flow else first.sigma  # x0 = x - sigma v; score = -eps / sigma
        direction = -first.guidance / divisor
        latents = first.latents.expand_as(first.cond).contiguous()

        def difference(x: Tensor) -> Tensor:
            return (predict.raw(x, first.timestep, cond=False) - predict.raw(x, first.timestep)) / divisor

        along = self._exact if self.method == "exact" else self._difference
        norm = along(difference, latents, direction).flatten(2).norm(dim=2)
        return {"sharpness": norm / latents[0, 0].numel() ** 0.5 if flow else norm}

    def _exact(self, field, latents: Tensor, direction: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no forward-mode derivative
            return torch.func.jvp(field, (latents,), (direction,))[1]

    def _difference(self, field, latents: Tensor, direction: Tensor) -> Tensor:
        length, speed = (s.flatten(2).norm(dim=2)[..., None, None, None] for s in (latents, direction))
        h = self.step * length / speed.clamp_min(torch.finfo(speed.dtype).tiny)
        return (field(latents + h * direction) - field(latents - h * direction)) / (2 * h)
