"""Norm of the guidance vector under the mask that the end-of-text token draws at the last step.

Chen, Liu, Shah, Xu, "Exploring Local Memorization in Diffusion Models via Bright Ending Attention", ICLR 2025:

    mean over steps of || (eps_c - eps_u) * m ||_2 / mean(m),   m the end-of-text token's attention at the last step

m is the mean over heads and cross-attention layers, at the latents' size, of the first end-of-text token's map. Since m
is known at the end only, what is kept of every step is the squared guidance at each pixel.

Deviation: all cross-attention layers count (the paper does not name a choice that fits every architecture), and outputs
of v-prediction checkpoints are turned into eps first.
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


@DETECTORS.register
@dataclass(frozen=True)
class BrightEnding(GenerationDetector):
    """``bright_ending``: values ``(rows,)``, at least 0. Of a step, energy and m are kept: ``(rows, 2, h, w)``."""

    name: ClassVar[str] = "bright_ending"
    asks: ClassVar[tuple[str, ...]] = ("attention",)
    terms: ClassVar[tuple[str, ...]] = ("bright_ending",)

    def attention_steps(self, steps: int) -> range:
        return range(steps - 1, steps)

    def reduce(self, step: Step, predict: Predictor) -> Tensor:
        energy = step.prediction.guidance.square().sum(1)
        mask = torch.zeros_like(energy) if step.attention is None else step.attention.end
        return torch.stack([energy, mask], dim=1)

    def __call__(self, kept: Tensor) -> dict[str, Tensor]:
        mask = kept[-1, :, 1]
        masked = (kept[:, :, 0] * mask.square()).flatten(2).sum(2).sqrt()  # (steps, rows)
        return {"bright_ending": masked.mean(0) / mask.flatten(1).mean(1)}
