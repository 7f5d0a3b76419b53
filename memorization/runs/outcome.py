"""What a mitigation does to a batch of prompts: pictures and measurements before and after."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from memorization.detectors.base import SCORED_BY
from memorization.errors import InputError
from memorization.mitigations.base import Mitigation
from memorization.mitigations.case import Case, Remedy
from memorization.models.finite import check_finite
from memorization.runs.sampling import sample
from memorization.similarity.judge import Judge


class Side(NamedTuple):
    """A case before or after: pictures, uint8 ``(prompts, noises, h, w, 3)``, and what is measured of each prompt."""

    pictures: np.ndarray
    measured: list[dict]
    seconds: float  # a prompt, to generate


def side(case: Case, remedy: Remedy, judge: Judge, training: Sequence[Path | None]) -> Side:
    """Generate, score and judge a case under a remedy.

    Args:
        training: file of each prompt's training picture, or None.
    """
    started = time.perf_counter()
    pictures = sample(case, remedy)
    seconds = (time.perf_counter() - started) / len(case.prompts)
    scores = [{"score": score} for score in scores_of(case, remedy)] if remedy.scorable else [{}] * len(pictures)
    measured = [
        {**score, **judge(own, prompt, path)}
        for score, own, prompt, path in zip(scores, pictures, case.prompts, training, strict=True)
    ]
    return Side(pictures, measured, round(seconds, 3))


@torch.no_grad()
def scores_of(case: Case, remedy: Remedy, name: str = SCORED_BY) -> list[float]:
    """Mean score of every prompt under the remedy's embedding, on the remedy's own noise.

    Raises:
        InputError: a score is not finite; names the prompt.
    """
    if (remedy.latents == case.noise).all():
        scores = case.score(name, remedy.embeds).tolist()
    else:
        alone = zip(remedy.latents, remedy.embeds.split(1), strict=True)
        scores = [replace(case, noise=latents).score(name, embed).item() for latents, embed in alone]
    check_finite(torch.tensor(scores), name, case.prompts)
    return [float(f"{score:.6g}") for score in scores]


class Outcome(NamedTuple):
    """What came of a batch of prompts; ``seconds`` a prompt, for the remedy alone."""

    remedy: Remedy
    before: Side
    after: Side
    seconds: float

    def pictures(self, i: int) -> dict[str, np.ndarray]:
        """Those of prompt ``i``, uint8 ``(noises, h, w, 3)``, before and after."""
        return {"before": self.before.pictures[i], "after": self.after.pictures[i]}

    def changed(self, case: Case, i: int) -> dict[str, Tensor]:
        """What the remedy changed of prompt ``i``, as :meth:`KeptInMemory.tensors`."""
        embeds, latents = self.remedy.embeds[i], self.remedy.latents[i]
        changed = case.pipe.given(
            None if torch.equal(embeds, case.embeds[i]) else embeds[None],
            None if torch.equal(latents, case.noise) else latents,
        )
        return {name: one.contiguous() for name, one in changed.items()}

    def rows(self, prompts: Sequence[str]) -> list[dict]:
        """A line a prompt."""
        return [
            {
                "prompt": prompt, "new_prompt": self.remedy.prompts[i],
                **{f"{key}_{when}": value for when, one in (("before", self.before), ("after", self.after))
                   for key, value in one.measured[i].items()},
                "iterations": self.remedy.iterations[i], "seconds": self.seconds,
                "seconds_generation": self.after.seconds,
            }
            for i, prompt in enumerate(prompts)
        ]  # fmt: skip


def mitigate(case: Case, mitigation: Mitigation, judge: Judge, training: Sequence[Path | None]) -> Outcome:
    """Find the remedy, generate with and without it from the same noise (unless it is other noise), and measure."""
    started = time.perf_counter()
    try:
        remedy = mitigation(case)
        seconds = (time.perf_counter() - started) / len(case.prompts)
        before = side(case, Remedy.unchanged(case), judge, training)
        after = side(case, remedy, judge, training)
    except FloatingPointError as error:
        raise InputError(f"{mitigation.name}: {error}; try --dtype float32") from None
    return Outcome(remedy, before, after, round(seconds, 3))
