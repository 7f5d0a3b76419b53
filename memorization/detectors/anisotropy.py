"""Anisotropy: norm of the guidance vector at high noise plus its angle to the unconditional score at low noise.

Asthana, Belagiannis, "Detecting and Mitigating Memorization in Diffusion Models through Anisotropy of the
Log-Probability", ICLR 2026, arXiv 2601.20642.

    M(x_T, c) = g_norm * ||d(x_T, t=981)||_2 + g_cos * cos(d(x_T, t=41), eps_u(x_T, t=41)),  d = eps_c - eps_u

on pure noise x_T, the same at both timesteps. Two variants:

- ``official`` gives the numbers of the public code: for v-prediction checkpoints (and others that it sends through the
  same branch, see ``branch``) the norm is (alpha/sigma^2) ||out_c - out_u|| and the cosine is taken on raw outputs.
- ``eps`` turns every output into eps first, so that one definition holds for every prediction type.

Deviations from the paper, all shared with its public code: the cosine is by default taken over the channels of each
latent pixel and averaged over pixels (``cosine="pixel"``); ``cosine="vector"`` is the formula's full-vector cosine.
From the public code: ``normalization`` acts here (there the flag reaches nothing): every prediction of an image is
divided by its L1 or L2 norm over the whole latent before the terms are formed. Of a flow the norm is that of x0_c -
x0_u over sqrt(d) (noise_norm.py says why), and the cosine is between noises, as ever.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from memorization.detectors.base import DETECTORS, PromptDetector

if TYPE_CHECKING:
    from local_sd_pipeline import NoisePrediction


@DETECTORS.register
@dataclass(frozen=True)
class Anisotropy(PromptDetector):
    """``anisotropy`` with its terms ``norm`` and ``cosine``: each ``(prompts, noises)``, higher means memorized.

    Args:
        norm_weight: g_norm.
        cosine_weight: g_cos.
        variant: ``official`` or ``eps``.
        cosine_mode: ``x,c|x`` = cos(eps_u, d), ``x,x|c`` = cos(eps_u, eps_c), ``x|c,c|x`` = cos(eps_c, d).
        cosine: ``pixel`` or ``vector``.
        normalization: ``None``, ``L1`` or ``L2``.
        branch: the branch of the public code that ``official`` follows: ``epsilon``, ``v``, or ``auto`` to go by the
            checkpoint's prediction type.
    """

    norm_weight: float = 1.0
    cosine_weight: float = 1.0
    variant: Literal["official", "eps"] = "official"
    cosine_mode: Literal["x,c|x", "x,x|c", "x|c,c|x"] = "x,c|x"
    cosine: Literal["pixel", "vector"] = "pixel"
    normalization: Literal["None", "L1", "L2"] = "None"
    branch: Literal["auto", "epsilon", "v"] = "auto"

    name: ClassVar[str] = "anisotropy"
    steps: ClassVar[tuple[int, ...]] = (0, -3)
    terms: ClassVar[tuple[str, ...]] = ("anisotropy", "norm", "cosine")
    weights: ClassVar[dict[str, str]] = {"norm_weight": "norm", "cosine_weight": "cosine"}

    def __call__(self, trace: list[NoisePrediction]) -> dict[str, Tensor]:
        high, low = trace
        norm = self._norm(high)
        cosine = self._cosine(low)
        return {
            "anisotropy": self.norm_weight * norm + self.cosine_weight * cosine,
            "norm": norm,
            "cosine": cosine,
        }

    def _outputs(self, point: NoisePrediction, pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """(unconditional, conditional) as the variant reads them, normalised if asked."""
        uncond, cond = pair
        return self._as_read(point, uncond), self._as_read(point, cond)

    def _as_read(self, point: NoisePrediction, output: Tensor) -> Tensor:
        if self.variant == "official" and point.prediction_type == "v_prediction":
            output = (output - point.sigma * point.latents) / point.alpha  # back to raw v
        if self.normalization != "None":
            order = {"L1": 1, "L2": 2}[self.normalization]
            output = normalize(output.flatten(-3), p=order, dim=-1).view_as(output)
        return output

    def _norm(self, point: NoisePrediction) -> Tensor:
        flow = point.prediction_type == "flow"
        uncond, cond = self._outputs(point, point.x0 if flow else point.eps)
        norm = (cond - uncond).flatten(2).norm(dim=2)
        if flow:
            return norm / cond[0, 0].numel() ** 0.5
        branch = "v" if self.branch == "auto" and point.prediction_type == "v_prediction" else self.branch
        if self.variant == "official" and branch == "v":
            norm = norm * point.alpha / point.sigma**2
        return norm

    def _cosine(self, point: NoisePrediction) -> Tensor:
        uncond, cond = self._outputs(point, point.eps)
        guidance = cond - uncond
        left, right = {
            "x,c|x": (uncond.expand_as(cond), guidance),
            "x,x|c": (uncond.expand_as(cond), cond),
            "x|c,c|x": (cond, guidance),
        }[self.cosine_mode]
        if self.cosine == "vector":
            return cosine_similarity(left.flatten(2), right.flatten(2), dim=2)
        return cosine_similarity(left, right, dim=2).mean(dim=(2, 3))
