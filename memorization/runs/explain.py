"""Which tokens trigger the prompts of a run."""

from __future__ import annotations

import torch
from tqdm import tqdm

from memorization.detectors.explain import Significance, token_significance
from memorization.errors import InputError
from memorization.evaluation.metrics import noise_mean
from memorization.models.base import ABILITIES, TextToImage
from memorization.models.generation import detection_grid
from memorization.models.loading import Model
from memorization.runs.detect import Scoring


def check_explainable(pipe: TextToImage) -> None:
    """See that a prompt's tokens can be taken one by one.

    Raises:
        InputError: the model's embeddings are more than the states of one text encoder.
    """
    if "text" not in pipe.can:
        raise InputError(f"tokens cannot be explained: needs {ABILITIES['text']}, which this model has not")


def explain(
    model: Model, rows: list[dict], by: str, scoring: Scoring, threshold: float | None
) -> list[tuple[float, Significance]]:
    """Score and significant tokens of the flagged prompts, or of the ten highest where there is no threshold.

    Args:
        rows: lines of a run.
        by: the score that ranks and flags them.
    """
    ranked = sorted(((noise_mean(row[by]), row["prompt"]) for row in rows), key=lambda pair: -pair[0])
    chosen = ranked[:10] if threshold is None else [pair for pair in ranked if pair[0] >= threshold]
    pipe = model.pipe
    check_explainable(pipe)
    latents, t = pipe.pure_noise(scoring.noises, scoring.seed), detection_grid(pipe, scoring.steps)[0]
    with torch.no_grad():
        uncond = pipe.predict_uncond(latents, [t]).eps[t]
    return [(score, token_significance(pipe, prompt, latents, t, uncond)) for score, prompt in tqdm(chosen, "explain")]
