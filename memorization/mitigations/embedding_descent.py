"""Gradient descent on the prompt embedding until a detector's score is that of an ordinary prompt.

The method of anisotropy.py, noise_norm.py and second_look.py, which differ in the score alone.

Deviations from Wen's public code: up to 20 steps; the target is a level among prompts that are not memorized, so that
it means the same on every model; the loss is each prompt's own mean over its noises, so that it means the same for
every batch; no weight decay.

Two things may be added. With a ``penalty`` w > 0 a step goes down score + w |target| |e - e0|^2 / |e0|^2, e0 the
prompt's own embedding without its start token: of the embeddings that reach the target, it looks for one near the
prompt's. With ``noises`` the score is a mean over more noises than are generated, so that it is not lowered on those
alone. In both cases a prompt stops at the first step at which its score is at the target.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from memorization.mitigations.base import Mitigation
from memorization.mitigations.case import Case, Remedy
from memorization.settings import Count, NotNegative, Positive
from optim_utils import all_but_the_start_token, descend


@dataclass(frozen=True)
class EmbeddingDescent(Mitigation):
    """Lower a detector's score by changing the embedding; the start token stays, where one encoder's states are all.

    Args:
        strength: the level to reach: share of ordinary prompts that score below.
        target: the score to reach, instead.
        lr, iterations: of the descent.
        penalty: w, of the distance from the prompt's own embedding.
        noises: that the score is a mean over, the first of the seed's; None for those that are generated.
    """

    strength: Positive = 0.5
    target: float | None = None
    lr: Positive = 0.05
    iterations: Count = 20
    penalty: NotNegative = 0.0
    noises: Count | None = None

    lowers: ClassVar[str]
    strengths: ClassVar[tuple[float, ...]] = (0.99, 0.9, 0.75, 0.5, 0.25)

    def __call__(self, case: Case) -> Remedy:
        target, free = self.bound(case.levels), case.pipe.free(case.embeds)
        if "text" in case.pipe.can:
            free = free * all_but_the_start_token(case.embeds)
        scored = case if self.noises is None else replace(case, noise=case.pipe.pure_noise(self.noises, case.seed))
        size = (free * case.embeds).square().flatten(1).sum(1)

        def distance(embeds: Tensor, rows: Tensor) -> Tensor:
            return self.penalty * abs(target) * (embeds - case.embeds[rows]).square().flatten(1).sum(1) / size[rows]

        found = descend(
            lambda embeds, rows: scored.score(self.lowers, embeds), case.embeds, lr=self.lr, target=target, free=free,
            iterations=self.iterations, penalty=distance if self.penalty else None,
        )  # fmt: skip
        return Remedy.unchanged(case, embeds=found.best, iterations=found.steps.tolist())
