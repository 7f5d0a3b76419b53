"""``rna``: random numbers are inserted at random places (Somepalli et al., see perturbation.py)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from memorization.mitigations.base import MITIGATIONS
from memorization.mitigations.perturbation import TextPerturbation


@MITIGATIONS.register
@dataclass(frozen=True)
class RandomNumbers(TextPerturbation):
    """``rna``. ``strength``: how many words."""

    name: ClassVar[str] = "rna"

    def word(self, words, case, rng) -> str:
        return str(rng.integers(1_000_000))
