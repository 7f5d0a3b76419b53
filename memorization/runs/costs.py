"""What each detector costs alone: UNet evaluations, counted, and seconds, a prompt and noise.

A term that needs fewer steps of a generation than its detector is measured by itself.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from tqdm import tqdm

from memorization.detectors.base import Detector, GenerationDetector
from memorization.io.files import write_atomically
from memorization.io.prompts import Listed
from memorization.models.base import TextToImage
from memorization.models.loading import Model
from memorization.runs.detect import Scoring
from memorization.runs.memory import default_batch_size
from memorization.runs.scorer import Scorer
from memorization.runs.store import Store


class RowCounter:
    """How many rows a UNet was given; ``rows`` may be set back to 0."""

    rows = 0


@contextmanager
def counted_rows(denoiser: torch.nn.Module) -> Iterator[RowCounter]:
    """Count the rows of every forward pass of ``denoiser`` while it lasts."""
    counter = RowCounter()

    def count(module, args, kwargs) -> None:
        counter.rows += len(args[0] if args else next(iter(kwargs.values())))

    hook = denoiser.register_forward_pre_hook(count, with_kwargs=True)
    try:
        yield counter
    finally:
        hook.remove()


def measure_costs(
    pipe: TextToImage,
    detectors: Sequence[Detector],
    prompts: Sequence[str],
    *,
    steps: int,
    batch_size: int,
) -> dict[str, dict]:
    """``{detector or term: {"needs", "evaluations", "seconds"}}`` a prompt with one noise.

    Each detector is run alone, and so is a term of it that reads fewer steps; ``all``: all detectors together.

    The unconditional predictions on pure noise, made once a run, are left out.
    """
    jobs: dict[str, tuple[list[Detector], int]] = {}  # who is run, on how many steps of a generation at most
    for detector in detectors:
        jobs[detector.name] = [detector], steps
        if isinstance(detector, GenerationDetector):
            read = detector.reads(steps)
            jobs |= {term: ([detector], read[term]) for term in detector.terms[1:] if term in read}
    if len(detectors) > 1:
        jobs["all"] = list(detectors), steps
    costs = {}
    with counted_rows(pipe.denoiser) as counter:
        for name, (group, read) in tqdm(jobs.items(), desc="costs", unit="detector"):
            scorer = Scorer(pipe, group, noises=1, seed=51, steps=steps, batch_size=batch_size)
            scorer.generated = min(scorer.generated, read)
            scorer(prompts[:1])  # warm up
            counter.rows = 0
            started = _now(pipe)
            for start in range(0, len(prompts), scorer.prompts_at_once):
                scorer(prompts[start : start + scorer.prompts_at_once])
            seconds = _now(pipe) - started
            costs[name] = {
                "needs": group[0].needs if len(group) == 1 else "-",
                "evaluations": round(counter.rows / len(prompts), 2),
                "seconds": float(f"{seconds / len(prompts):.4g}"),
            }
    return costs


def write_costs(
    model: Model, detectors: Sequence[Detector], listed: Listed, scoring: Scoring, store: Store, path: Path
) -> None:
    """The costs on the first four prompts of a run, as JSON."""
    batch_size = scoring.batch_size or default_batch_size(model.pipe)
    costs = measure_costs(
        model.pipe, detectors, listed.frame["prompt"].tolist()[:4], steps=scoring.steps,
        batch_size=store.record.get("batch_size_used", batch_size),
    )  # fmt: skip
    write_atomically(path, json.dumps(costs, indent=1) + "\n")


def _now(pipe: TextToImage) -> float:
    if pipe.device.type == "cuda":
        torch.cuda.synchronize(pipe.device)
    return time.perf_counter()
