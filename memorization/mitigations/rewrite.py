"""Other words: the prompt's text is changed until the detector takes it for an ordinary prompt.

Ours. The most significant word (by the gradient of the guidance vector's norm, see detectors/explain.py) is replaced by
the candidate nearest to it among those that bring the score below the target, or by that of lowest score where none
does; then the next word, until the target or the limit is reached. Candidates are the real words that the text encoder
takes for the nearest (words.py), of the same ending, in the old word's case and punctuation, none twice in a sentence.
Articles, prepositions and the like stay, and "a" becomes "an" where it has to. The result is a sentence as long as the
prompt, usable in any interface.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch

from memorization.detectors.explain import token_significance
from memorization.io.files import sha256_of
from memorization.mitigations.base import MITIGATIONS, Mitigation
from memorization.mitigations.case import Case, Remedy
from memorization.mitigations.words import GRAMMAR, nearest_words, read_words, real_words, with_articles
from memorization.settings import Count, Positive, Share

STAYING = frozenset(GRAMMAR.split())
WORD = re.compile(r"(\W*)([^\W\d_]{2,})(\W*)")  # with the punctuation round it


@MITIGATIONS.register
@dataclass(frozen=True)
class Rewrite(Mitigation):
    """``rewrite``.

    Args:
        strength: the level to reach.
        target: the score to reach, instead.
        candidates: replacements tried for a word.
        share: at most this share of the words is changed.
        words: a file of words to choose from, one a line; default: English words that are one token of the vocabulary.
    """

    strength: Positive = 0.5
    target: float | None = None
    candidates: Count = 16
    share: Share = 0.5
    words: Path | None = None

    name: ClassVar[str] = "rewrite"
    asks: ClassVar[tuple[str, ...]] = ("text",)
    lowers: ClassVar[str] = "anisotropy"
    strengths: ClassVar[tuple[float, ...]] = (0.99, 0.9, 0.75, 0.5, 0.25)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.words is not None:
            read_words(self.words)  # said before the model is loaded

    def record(self) -> dict:
        return {**vars(self), "words": self.words and f"sha256:{sha256_of(self.words)}"}

    def __call__(self, case: Case) -> Remedy:
        target = self.bound(case.levels)
        with torch.no_grad():
            scores = case.score(self.lowers, case.embeds)
        found = [
            (prompt, 0) if score <= target else self._rewrite(case, prompt, target)
            for prompt, score in zip(case.prompts, scores.tolist(), strict=True)
        ]
        prompts = [prompt for prompt, _ in found]
        embeds = case.pipe.embed(prompts).float()
        return Remedy.unchanged(case, prompts=prompts, embeds=embeds, iterations=[changes for _, changes in found])

    def _rewrite(self, case: Case, prompt: str, target: float) -> tuple[str, int]:
        """The new prompt and how many words were changed."""
        words = prompt.split()
        order = [place for place in word_order(case, prompt) if replaceable(words[place])]
        changes = 0
        for place in order[: max(1, round(self.share * len(words)))]:
            options = [words, *(with_articles([*words[:place], word, *words[place + 1 :]], place)
                                for word in self._offered(case, words, place))]  # fmt: skip
            with torch.no_grad():
                scores = case.score(self.lowers, case.pipe.embed([" ".join(option) for option in options]).float())
            good = (scores <= target).nonzero()[:, 0].tolist()
            chosen = options[good[0] if good else int(scores.argmin())]
            changes += chosen != words
            words = chosen
            if good:
                break
        return " ".join(words), changes

    def _offered(self, case: Case, words: list[str], place: int) -> list[str]:
        """What may stand at ``place``, nearest first, as the word there is written."""
        before, word, after = _parts(words[place])
        used = {_parts(other)[1].lower() for other in words}
        known = real_words(case.pipe.tokenizer, self.words)
        near = nearest_words(case.pipe, word, known, self.candidates + len(used))
        fresh = [other for other in near if other.lower() not in used][: self.candidates]
        return [before + as_written(other, word) + after for other in fresh]


def _parts(word: str) -> tuple[str, str, str]:
    """Punctuation before, the word, punctuation after; all of it the word where it is none of letters alone."""
    found = WORD.fullmatch(word)
    return (found[1], found[2], found[3]) if found else ("", word, "")


def replaceable(word: str) -> bool:
    """Whether it is a word of letters that does more than hold the sentence together."""
    return bool(WORD.fullmatch(word)) and _parts(word)[1].lower() not in STAYING


def as_written(word: str, like: str) -> str:
    """``word`` in the case of ``like``: lower, Capitalised or UPPER."""
    return word.upper() if like.isupper() else word.capitalize() if like[0].isupper() else word


def word_order(case: Case, prompt: str) -> list[int]:
    """Places of the words of ``prompt``, the most significant first: a word counts as its strongest token.

    Words past the model's limit of tokens are left out: the model does not see them.
    """
    t = case.grid[0]
    values = token_significance(case.pipe, prompt, case.noise, t, case.uncond.eps[t]).values.tolist()
    strongest, start = [], 0
    for word in prompt.split():
        if start >= len(values):
            break
        length = len(case.pipe.tokenizer(word, add_special_tokens=False).input_ids)
        strongest.append(max(values[start : start + length], default=0.0))
        start += length
    return sorted(range(len(strongest)), key=lambda place: -strongest[place])
