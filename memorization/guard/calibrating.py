"""Thresholds from ordinary prompts alone, by the user's own pipeline: what :func:`.protect` reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from memorization.errors import InputError
from memorization.guard.call import Call
from memorization.guard.generation import Generation
from memorization.guard.hooks import Watch
from memorization.guard.thresholds import Conditions, Thresholds, fixed_conditions
from memorization.io.families import near_copy_families


class _Read(BaseException):
    """The scores of a generation were read; the rest of it is not drawn."""


class _Reader(Watch):
    """Stops every generation once its score is read."""

    def __init__(self, pipe: Any, steps: int) -> None:
        super().__init__(pipe, steps)
        self.here: dict[str, Any] = {}

    def _decide(self, generation: Generation, call: Call, output: Tensor) -> Tensor:
        self.here = self.conditions(generation, call)
        raise _Read

    def scores(self, prompts: Sequence[str], generator: torch.Generator, **options: Any) -> list[float]:
        """Of some prompts, one noise each."""
        try:
            self.pipe(list(prompts), generator=generator, **options)
        except _Read:
            return self.generation.scores.tolist()
        raise InputError("the pipeline made no step whose score could be read")


def calibrate(
    pipe: Any,
    prompts: Sequence[str],
    *,
    families: Sequence[str] | None = None,
    fpr: float = 0.01,
    steps: int = 1,
    generator: torch.Generator | None = None,
    batch_size: int = 8,
    **options: Any,
) -> Thresholds:
    """Thresholds of a pipeline, from prompts that are not memorized, one noise each.

    Of near-copies among the prompts one is taken: the interval of the rate of false alarms (Clopper and Pearson) is of
    prompts that have nothing to do with one another.

    Args:
        families: of the prompts; near-copies share one. None to find them by their words.
        fpr: share of ordinary pictures that may be flagged.
        steps: whose scores are averaged.
        generator: of the noise; default: one of seed 51, on the CPU.
        batch_size: prompts to a call of the pipeline.
        options: of the pipeline's call, as they will be in use: ``num_inference_steps``, ``guidance_scale``, ... But
            for ``num_images_per_prompt``, which is 1: pictures of one prompt are not independent, and prompts count.

    Raises:
        InputError: too few prompts for the rate, a score is not finite, or the pipeline is of no known family.
    """
    families = near_copy_families(list(prompts)) if families is None else families
    chosen = list({family: prompt for prompt, family in zip(prompts, families, strict=True)}.values())
    generator = generator or torch.Generator().manual_seed(51)
    reader, scores = _Reader(pipe, steps), []
    try:
        for start in tqdm(range(0, len(chosen), batch_size), desc="calibrate", unit="batch"):
            batch = chosen[start : start + batch_size]
            scores += reader.scores(batch, generator, **{**options, "num_images_per_prompt": 1})
        fixed = fixed_conditions(pipe, reader.family)
    finally:
        reader.release()
    holds_for = asdict(Conditions(**fixed, **reader.here))
    rounded = tuple(float(f"{score:.6g}") for score in scores)
    name = str(pipe.config.get("_name_or_path") or type(pipe).__name__)
    return Thresholds(name, holds_for, fpr, rounded, len(prompts) - len(chosen))
