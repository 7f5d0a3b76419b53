"""Lower the second look's score of the prompt embedding until it is that of an ordinary prompt.

Ours: the descent of anisotropy.py against the guidance vector where one guided step leads (detectors/second_look.py),
which is where a copy is made, instead of on pure noise.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from memorization.mitigations.base import MITIGATIONS
from memorization.mitigations.embedding_descent import EmbeddingDescent


@MITIGATIONS.register
@dataclass(frozen=True)
class SecondLook(EmbeddingDescent):
    """``second_look``."""

    name: ClassVar[str] = "second_look"
    lowers: ClassVar[str] = "second_look"
