"""Entropy of the cross-attention over the tokens.

Ren et al., "Unveiling and Mitigating Memorization in Text-to-image Diffusion Models through Cross Attention", ECCV
2024. With a_i the attention on token i, mean over heads and pixels, and E = - sum of a_i log a_i:

    attention_entropy  mean of E over the last T/5 steps, a averaged over layers, plus the mean there of |P - P_first|,
                       P the part of the sum that comes from end-of-text and padding tokens, P_first at the first step:
                       the paper's formula
    signed_entropy     the same with P - P_first: what its public code adds
    layer_entropy      E of one layer at the first step

Memorized prompts spread their attention over trigger tokens, others rest on the start token: higher means memorized.

Deviation: the layer is the fourth cross-attention layer where there are as many, else the last; the paper chose it on
Stable Diffusion 1.4.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from memorization.detectors.base import DETECTORS, GenerationDetector
from memorization.settings import Place

if TYPE_CHECKING:
    from memorization.models.generation import Step
    from memorization.models.predictor import Predictor


@DETECTORS.register
@dataclass(frozen=True)
class AttentionEntropy(GenerationDetector):
    """``attention_entropy`` in nats with its terms ``signed_entropy`` and ``layer_entropy``: values ``(rows,)``.

    Args:
        layer: cross-attention layer of ``layer_entropy``, from 0 in the order of the UNet's forward pass.
    """

    layer: Place = 3

    name: ClassVar[str] = "attention_entropy"
    asks: ClassVar[tuple[str, ...]] = ("attention",)
    terms: ClassVar[tuple[str, ...]] = ("attention_entropy", "signed_entropy", "layer_entropy")

    def attention_steps(self, steps: int) -> list[int]:
        return [0, *range(steps - max(1, steps // 5), steps)]

    def reads(self, steps: int) -> dict[str, int]:
        return {"layer_entropy": 1}

    def reduce(self, step: Step, predict: Predictor) -> Tensor:
        """E of all layers together, its part from padding, and E of the one layer: ``(rows, 3)``."""
        if step.attention is None:
            return step.prediction.cond.new_full((len(step.prediction.cond), 3), torch.nan)
        tokens = step.attention.tokens
        together, one = _surprise(tokens.mean(0)), _surprise(tokens[min(self.layer, len(tokens) - 1)])
        padding = torch.arange(tokens.shape[-1], device=tokens.device) >= step.attention.ends[:, None]
        return torch.stack([together.sum(1), (together * padding).sum(1), one.sum(1)], dim=1)

    def __call__(self, kept: Tensor) -> dict[str, Tensor]:
        late = kept[-max(1, len(kept) // 5) :]
        entropy, change = late[:, :, 0], late[:, :, 1] - kept[0, :, 1]
        return {
            "attention_entropy": (entropy + change.abs()).mean(0),
            "signed_entropy": (entropy + change).mean(0),
            "layer_entropy": kept[0, :, 2],
        }


def _surprise(share: Tensor) -> Tensor:
    """- a log a, 0 at a = 0."""
    return -torch.special.xlogy(share, share)
