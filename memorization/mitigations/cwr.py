"""``cwr``: words of the prompt are repeated at random places (Somepalli et al., see perturbation.py)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from memorization.mitigations.base import MITIGATIONS
from memorization.mitigations.perturbation import TextPerturbation


@MITIGATIONS.register
@dataclass(frozen=True)
class WordRepetition(TextPerturbation):
    """``cwr``. ``strength``: how many words."""

    name: ClassVar[str] = "cwr"

    def word(self, words, case, rng) -> str:
        return words[rng.integers(len(words))] if words else ""
