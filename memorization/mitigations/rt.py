"""``rt``: random words are inserted at random places (Somepalli et al., see perturbation.py)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from memorization.mitigations.base import MITIGATIONS
from memorization.mitigations.perturbation import TextPerturbation, known_words


@MITIGATIONS.register
@dataclass(frozen=True)
class RandomTokens(TextPerturbation):
    """``rt``. ``strength``: how many words."""

    name: ClassVar[str] = "rt"

    def word(self, words, case, rng) -> str:
        return str(rng.choice(known_words(case.pipe.tokenizer)))
