"""Mitigate a list of prompts, with pictures and measurements before and after, into a folder."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from PIL import Image
from safetensors.torch import save_file
from tqdm import tqdm

from memorization.errors import InputError
from memorization.io.figures import save_figure
from memorization.io.pictures import read_picture
from memorization.mitigations.base import Mitigation
from memorization.mitigations.case import Case, Remedy
from memorization.runs.memory import with_memory
from memorization.runs.sampling import sample
from memorization.runs.store import ResultStore
from memorization.similarity.judge import Judge

SCORED_BY = "anisotropy"


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
    for score, prompt in zip(scores, case.prompts, strict=True):
        if not math.isfinite(score):
            raise InputError(f"{name} is NaN or infinite for {prompt!r}; try --dtype float32")
    return [float(f"{score:.6g}") for score in scores]


class Outcome(NamedTuple):
    """What came of a batch of prompts; ``seconds`` a prompt, for the remedy alone."""

    remedy: Remedy
    before: Side
    after: Side
    seconds: float

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


def mitigate(
    case: Case, mitigation: Mitigation, judge: Judge, training: Sequence[Path | None], before: Side | None = None
) -> Outcome:
    """Find the remedy, generate with and without it from the same noise (unless it is other noise), and measure.

    Args:
        before: the side without it, where it is known.
    """
    started = time.perf_counter()
    try:
        remedy = mitigation(case)
        seconds = (time.perf_counter() - started) / len(case.prompts)
        if before is None:
            before = side(case, Remedy.unchanged(case), judge, training)
        after = side(case, remedy, judge, training)
    except FloatingPointError as error:
        raise InputError(f"{mitigation.name}: {error}; try --dtype float32") from None
    return Outcome(remedy, before, after, round(seconds, 3))


def run_mitigation(
    case_of: Callable[..., Case],
    mitigation: Mitigation,
    prompts: pd.DataFrame,
    judge: Judge,
    store: ResultStore,
    *,
    batch_size: int,
    noises: int,
) -> None:
    """Mitigate ``prompts`` into ``store``, from where it stopped.

    Their columns: ``prompt``, and ``picture``, the file of the training picture or None. ``case_of(prompts,
    batch_size=...)`` makes a case; on out of memory the batch size is halved.

    Beside the lines go ``images/<id>-before-<n>.png``, ``images/<id>-after-<n>.png`` and ``embeds/<id>.safetensors``
    (``prompt_embeds`` and ``latents``, whichever the remedy changed;
    no file where it changes the sampling alone).
    """
    if store.done == len(prompts):
        return
    store.start()
    for name in ("images", "embeds"):
        if store.done == 0:
            shutil.rmtree(store.folder / name, ignore_errors=True)  # of a run that was overwritten
        (store.folder / name).mkdir(exist_ok=True)

    def work(size: int) -> None:
        _mitigate_all(partial(case_of, batch_size=size), mitigation, prompts, judge, store, max(1, size // noises))

    with_memory(work, store, batch_size)


def _mitigate_all(case_of, mitigation, prompts: pd.DataFrame, judge: Judge, store: ResultStore, at_once: int) -> None:
    with tqdm(total=len(prompts), initial=store.done, desc=store.folder.name, unit="prompt", smoothing=0) as bar:
        for start in range(store.done // at_once * at_once, len(prompts), at_once):
            batch = prompts.iloc[start : start + at_once]
            case = case_of(batch["prompt"].tolist())
            outcome = mitigate(case, mitigation, judge, batch["picture"].tolist())
            rows = [{"id": start + i, **row} for i, row in enumerate(outcome.rows(case.prompts))]
            for i, row in enumerate(rows):
                _save(store.folder, row["id"], case, outcome, i)
            missing = rows[store.done - start :]
            store.append(missing)
            bar.update(len(missing))


def _save(folder: Path, number: int, case: Case, outcome: Outcome, i: int) -> None:
    for when, one in (("before", outcome.before), ("after", outcome.after)):
        for n, picture in enumerate(one.pictures[i]):
            Image.fromarray(picture).save(folder / "images" / f"{number:04d}-{when}-{n}.png")
    embeds, latents = outcome.remedy.embeds[i], outcome.remedy.latents[i]
    tensors = {}
    if not torch.equal(embeds, case.embeds[i]):
        tensors["prompt_embeds"] = embeds[None].contiguous()
    if not torch.equal(latents, case.noise):
        tensors["latents"] = latents.contiguous()
    if tensors:  # a file with the memorized prompt's own embedding would be no remedy
        save_file(tensors, folder / "embeds" / f"{number:04d}.safetensors")


def contact_sheet(
    folder: Path, rows: list[dict], training: Sequence[Path | None], count: int, path: Path, limit: int = 16
) -> Path:
    """Training picture, ``count`` pictures before and as many after, a row a prompt."""
    rows = rows[:limit]
    figure, axes = plt.subplots(
        len(rows), 3, figsize=(1.1 * (1 + 2 * count), 1.25 * len(rows)), width_ratios=[1, count, count], squeeze=False
    )
    for row, image, (left, middle, right) in zip(rows, training, axes, strict=False):
        for axis, when in ((middle, "before"), (right, "after")):
            pictures = [Image.open(folder / "images" / f"{row['id']:04d}-{when}-{n}.png") for n in range(count)]
            axis.imshow(np.concatenate([np.asarray(picture) for picture in pictures], axis=1))
        if image is not None:
            left.imshow(read_picture(image, pictures[0].size[::-1]))
        for axis, key, when in ((middle, "prompt", "before"), (right, "new_prompt", "after")):
            score = f": {row[f'score_{when}']:.3g}" if f"score_{when}" in row else ""
            axis.set_title(row[key][:60] + score, fontsize=7, loc="left", pad=2, parse_math=False)
    for axis in axes.flat:
        axis.axis("off")
    axes[0, 0].set_title("training", fontsize=7, pad=2)
    figure.suptitle("training picture | before | after: score", fontsize=8)
    return save_figure(figure, path)
