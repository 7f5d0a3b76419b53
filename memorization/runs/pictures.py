"""Score pictures instead of prompts, with the detectors that need a picture alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import torch
from tqdm import tqdm

from local_sd_pipeline import LocalStableDiffusionPipeline
from memorization.detectors.base import Detector
from memorization.models.decoding import encode
from memorization.models.predictor import Predictor
from memorization.runs.detect import KEPT, as_rows
from memorization.runs.memory import with_memory
from memorization.runs.store import ResultStore


@torch.no_grad()
def run_pictures(
    pipe: LocalStableDiffusionPipeline,
    pictures: pd.DataFrame,
    detectors: Sequence[Detector],
    store: ResultStore,
    *,
    batch_size: int,
    at_once: int = 4,
) -> None:
    """Score the pictures of :func:`list_pictures` into ``store``, from where it stopped, ``at_once`` together."""
    if store.done < len(pictures):
        store.start()
        with_memory(lambda size: _score_all(pipe, pictures, detectors, store, size, at_once), store, batch_size)


def _score_all(pipe, pictures: pd.DataFrame, detectors, store: ResultStore, batch_size: int, at_once: int) -> None:
    keep = [column for column in KEPT if column in pictures]
    empty = pipe.embed([""])
    first = store.done // at_once * at_once
    for start in tqdm(range(first, len(pictures), at_once), desc=store.folder.name, unit=f"{at_once} pictures"):
        batch = pictures.iloc[start : start + at_once]
        predict = Predictor(pipe, pipe.embed(batch["prompt"].tolist()), empty, batch_size)
        clean, values = encode(pipe, batch["image"].tolist()), {}
        for detector in detectors:
            values |= {name: value[:, None] for name, value in detector(clean, predict).items()}
        scores = as_rows(values, batch["image"].tolist())
        rows = [
            {"id": start + i, "prompt": row["prompt"], "image": Path(row["image"]).name,
             **{column: row[column] for column in keep}, **score}
            for i, (row, score) in enumerate(zip(batch.to_dict("records"), scores, strict=True))
        ]  # fmt: skip
        store.append(rows[store.done - start :])
