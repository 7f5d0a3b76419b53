"""Guidance away from the memorized prompt, towards an embedding near it that is not memorized: prompt re-anchoring.

Chen, Liu, Shah, Xu, "Enhancing Privacy-Utility Trade-offs to Mitigate Memorization in Diffusion Models", CVPR 2025
(PRSS, its part PR). Classifier-free guidance takes the memorized prompt y as its anchor instead of the empty one:

    eps_hat = eps(x_t, y) + s0 (eps(x_t, y*) - eps(x_t, y)),   y* what y was changed to

Here y* is the embedding that the descent of noise_norm.py finds (their baseline, Wen et al.); a prompt that is at or
below the level from the start is sampled as usual.

Deviations: their other part, the search for y* by a language model, is left out. Their rule by which a prompt counts as
memorized, and at which steps, was not at hand: here it is the level, decided once, for all steps. One more evaluation
a step.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from local_sd_pipeline import NoisePrediction
from memorization.mitigations.base import MITIGATIONS
from memorization.mitigations.case import Case, Remedy
from memorization.mitigations.embedding_descent import EmbeddingDescent
from memorization.models.generation import Guide


@MITIGATIONS.register
@dataclass(frozen=True)
class Reanchor(EmbeddingDescent):
    """``reanchor``."""

    name: ClassVar[str] = "reanchor"
    lowers: ClassVar[str] = "noise_norm"

    def __call__(self, case: Case) -> Remedy:
        remedy = super().__call__(case)
        moved = (remedy.embeds != case.embeds).flatten(1).any(1)
        return replace(remedy, guide=lambda rows: self._guide(case, rows, moved[rows // len(case.noise)]))

    def _guide(self, case: Case, rows: Tensor, moved: Tensor) -> Guide:
        anchors = case.embeds[rows // len(case.noise)][moved]

        def guide(index: int, point: NoisePrediction) -> Tensor:
            base = point.uncond.clone()
            if len(anchors):
                base[moved] = case.pipe.predict_noise(point.latents[moved], point.timestep, anchors)
            return base + case.guidance_scale * (point.cond - base)

        return guide
