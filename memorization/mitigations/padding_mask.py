"""No cross-attention for a part of the padding tokens.

Kim, No, "Memorization In Stable Diffusion Is Unexpectedly Driven by CLIP Embeddings", 2026 (arXiv 2605.02908), the
second of their mitigations, partial masking: the padding tokens repeat the end-of-text embedding, and a memorized
picture hangs on them rather than on the prompt's own tokens.

Deviation: how they mask, and which of the tokens, was not at hand. Here the masked tokens get no attention in any
cross-attention layer of the conditional half, at every step, and they are the last ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from memorization.mitigations.attention_rescale import rescaled
from memorization.mitigations.base import MITIGATIONS, Mitigation
from memorization.mitigations.case import Case, Remedy
from memorization.models.attention import end_of_text
from memorization.settings import Share


@MITIGATIONS.register
@dataclass(frozen=True)
class PaddingMask(Mitigation):
    """``padding_mask``. ``strength``: the share of a prompt's padding tokens that is masked."""

    strength: Share = 0.8

    name: ClassVar[str] = "padding_mask"
    asks: ClassVar[tuple[str, ...]] = ("attention",)
    strengths: ClassVar[tuple[float, ...]] = (0.4, 0.6, 0.8, 0.9, 1.0)

    def __call__(self, case: Case) -> Remedy:
        ends = end_of_text(case.pipe, case.prompts)
        padding = case.pipe.tokenizer.model_max_length - 1 - ends
        kept = (ends + padding - (self.strength * padding).round().long()).repeat_interleave(len(case.noise))
        return Remedy.unchanged(case, around=lambda rows: rescaled(case.pipe.unet, kept[rows], 1.0))
