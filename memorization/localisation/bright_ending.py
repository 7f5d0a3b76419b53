"""The mask of Bright Ending: where the end-of-text token's attention lies at the last step.

Chen, Liu, Shah, Xu, "Exploring Local Memorization in Diffusion Models via Bright Ending Attention", ICLR 2025. The mean
over heads and cross-attention layers, at the latents' size, of the first end-of-text token's map.

Deviation: all cross-attention layers count, as in the detector of that name (detectors/bright_ending.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from memorization.localisation.base import MAPS, Map

if TYPE_CHECKING:
    from memorization.models.generation import Step
    from memorization.models.predictor import Predictor


@MAPS.register
@dataclass(frozen=True)
class BrightEnding(Map):
    """``bright_ending``: ``(rows, h, w)``, shares of attention in [0, 1]."""

    name: ClassVar[str] = "bright_ending"
    needs_attention: ClassVar[bool] = True
    asks: ClassVar[tuple[str, ...]] = ("attention", "pictures")

    def __call__(self, last: Step, predict: Predictor) -> Tensor:
        assert last.attention is not None  # it was asked for
        return last.attention.end
