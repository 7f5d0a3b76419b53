"""Gradient descent on the prompt embedding until a detector's score is that of an ordinary prompt.

The method of anisotropy.py and noise_norm.py, which differ in the score alone.

Deviations from Wen's public code: up to 20 steps; the target is a level among prompts that are not memorized, so that
it means the same on every model; the loss is each prompt's own mean over its noises, so that it means the same for
every batch; no weight decay.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from memorization.mitigations.base import Mitigation
from memorization.mitigations.case import Case, Remedy
from memorization.settings import Count, Positive
from optim_utils import all_but_the_start_token, descend


@dataclass(frozen=True)
class EmbeddingDescent(Mitigation):
    """Lower a detector's score by changing the embedding; the start token stays.

    Args:
        strength: the level to reach: share of ordinary prompts that score below.
        target: the score to reach, instead.
        lr, iterations: of the descent.
    """

    strength: Positive = 0.5
    target: float | None = None
    lr: Positive = 0.05
    iterations: Count = 20

    lowers: ClassVar[str]
    strengths: ClassVar[tuple[float, ...]] = (0.99, 0.9, 0.75, 0.5, 0.25)

    def __call__(self, case: Case) -> Remedy:
        found = descend(
            lambda embeds, rows: case.score(self.lowers, embeds), case.embeds, lr=self.lr, iterations=self.iterations,
            target=self.bound(case.levels), free=all_but_the_start_token(case.embeds),
        )  # fmt: skip
        return Remedy.unchanged(case, embeds=found.best, iterations=found.steps.tolist())
