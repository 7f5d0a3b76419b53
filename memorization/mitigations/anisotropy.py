"""Lower the anisotropy score of the prompt embedding until it is that of an ordinary prompt.

Asthana, Belagiannis, ICLR 2026 (arXiv 2601.20642), section on mitigation: minimise M over the embedding, x_T fixed.
Learning rate and number of steps are not published; embedding_descent.py has ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from memorization.mitigations.base import MITIGATIONS
from memorization.mitigations.embedding_descent import EmbeddingDescent


@MITIGATIONS.register
@dataclass(frozen=True)
class Anisotropy(EmbeddingDescent):
    """``anisotropy``."""

    name: ClassVar[str] = "anisotropy"
    lowers: ClassVar[str] = "anisotropy"
