"""Lower the norm of the guidance vector at the first step until it is that of an ordinary prompt.

Wen, Liu, Chen, Lyu, "Detecting, Explaining, and Mitigating Memorization in Diffusion Models", ICLR 2024, section 5.1:
Adam on the embedding, 0.05, at most 10 steps, and a stop at a target; embedding_descent.py has the deviations.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from memorization.mitigations.base import MITIGATIONS
from memorization.mitigations.embedding_descent import EmbeddingDescent


@MITIGATIONS.register
@dataclass(frozen=True)
class NoiseNorm(EmbeddingDescent):
    """``noise_norm``."""

    name: ClassVar[str] = "noise_norm"
    lowers: ClassVar[str] = "noise_norm"
