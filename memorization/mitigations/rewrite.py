"""Other words: the prompt's text is changed until the detector takes it for an ordinary prompt.

Ours. The most significant word (by the gradient of the guidance vector's norm, see detectors/explain.py) is replaced by
the candidate nearest to it among those that bring the score below the target, or by that of lowest score where none
does; then the next word, until the target or the limit is reached. Candidates are the whole-word tokens whose input
embeddings are nearest to the word's, and nothing (the word is dropped). The result is text, usable in any interface.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from memorization.detectors.explain import token_significance
from memorization.mitigations.base import MITIGATIONS, Mitigation
from memorization.mitigations.case import Case, Remedy
from memorization.mitigations.perturbation import whole_words
from memorization.settings import Count, Positive, Share


@MITIGATIONS.register
@dataclass(frozen=True)
class Rewrite(Mitigation):
    """``rewrite``.

    Args:
        strength: the level to reach.
        target: the score to reach, instead.
        candidates: replacements tried for a word.
        share: at most this share of the words is changed.
    """

    strength: Positive = 0.5
    target: float | None = None
    candidates: Count = 16
    share: Share = 0.5

    name: ClassVar[str] = "rewrite"
    lowers: ClassVar[str] = "anisotropy"
    strengths: ClassVar[tuple[float, ...]] = (0.99, 0.9, 0.75, 0.5, 0.25)

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
        words, order = prompt.split(), word_order(case, prompt)
        changes = 0
        for place in order[: max(1, round(self.share * len(words)))]:
            offered = [*nearest_words(case.pipe, words[place], self.candidates), "", words[place]]
            options = [joined([*words[:place], word, *words[place + 1 :]]) for word in offered]
            with torch.no_grad():
                scores = case.score(self.lowers, case.pipe.embed(options).float())
            scores[[not option for option in options]] = torch.inf  # an empty prompt is no rewriting
            good = (scores <= target).nonzero()[:, 0].tolist()
            chosen = offered[good[0] if good else int(scores.argmin())]
            changes += chosen != words[place]
            words[place] = chosen  # a dropped word leaves an empty place, so that the places of the others stay
            if good:
                break
        return joined(words), changes


def joined(words: list[str]) -> str:
    """The words with single spaces, without the dropped ones."""
    return " ".join(word for word in words if word)


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


def nearest_words(pipe, word: str, count: int) -> list[str]:
    """The ``count`` whole-word tokens nearest to ``word`` by input embedding, nearest first, without itself."""
    table: Tensor = pipe.text_encoder.get_input_embeddings().weight.float()
    words = [other for other in whole_words(pipe.tokenizer) if other.lower() != word.lower()]
    ids = [pipe.tokenizer.convert_tokens_to_ids(f"{other}</w>") for other in words]
    own = table[pipe.tokenizer(word, add_special_tokens=False).input_ids].mean(0)
    order = cosine_similarity(table[ids], own[None]).argsort(descending=True)[:count].tolist()
    return [words[i] for i in order]
