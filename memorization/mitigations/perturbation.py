"""Random changes of the prompt, the baselines of Somepalli et al.

Somepalli, Singla, Goldblum, Geiping, Goldstein, "Understanding and Mitigating Copying in Diffusion Models", NeurIPS
2023:

- ``rna``: random numbers are inserted; ``rt``: random words; ``cwr``: words of the prompt are repeated; each at random
  places;
- ``gni``: Gaussian noise is added to the embedding.

The draws of a prompt depend on its text and the seed alone, not on the batch.
"""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import numpy as np

from memorization.errors import InputError
from memorization.mitigations.base import Mitigation
from memorization.mitigations.case import Case, Remedy
from memorization.settings import Count


def generator_of(prompt: str, seed: int) -> np.random.Generator:
    """A generator for a prompt."""
    digest = hashlib.sha256(f"{seed}/{prompt}".encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:8], "big"))


@cache
def whole_words(tokenizer) -> tuple[str, ...]:
    """Words that are one token of ``tokenizer``, in the order of their ids; of three letters or more if it has such."""
    found = []
    for token, _ in sorted(tokenizer.get_vocab().items(), key=lambda pair: pair[1]):
        word = token.removesuffix("</w>").removeprefix("▁")  # as CLIP's vocabulary marks a word's end, and T5's a start
        if word != token and word.isascii() and word.isalpha():
            found.append(word)
    return tuple(word for word in found if len(word) > 2) or tuple(found)


def known_words(tokenizer) -> tuple[str, ...]:
    """As :func:`whole_words`.

    Raises:
        InputError: the vocabulary has none.
    """
    if not (found := whole_words(tokenizer)):
        raise InputError("the tokenizer's vocabulary has no whole words to take one of")
    return found


@dataclass(frozen=True)
class TextPerturbation(Mitigation):
    """Insert ``strength`` words at random places."""

    strength: Count = 4

    strengths: ClassVar[tuple[float, ...]] = (1, 2, 4, 6, 8)

    @abstractmethod
    def word(self, words: list[str], case: Case, rng: np.random.Generator) -> str:
        """The word to insert next."""

    def __call__(self, case: Case) -> Remedy:
        changed = []
        for prompt in case.prompts:
            rng, words = generator_of(prompt, case.seed), prompt.split()
            for _ in range(self.strength):
                words.insert(rng.integers(len(words) + 1), self.word(words, case, rng))
            changed.append(" ".join(words))
        return Remedy.unchanged(case, prompts=changed, embeds=case.pipe.embed(changed).float())
