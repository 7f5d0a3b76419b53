"""Mitigate a list of prompts, with pictures and measurements before and after, into a folder."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from PIL import Image
from safetensors.torch import save_file
from tqdm import tqdm

from memorization.mitigations import Case, Mitigation, Remedy
from memorization.plots import save_figure
from memorization.results import ResultStore
from memorization.sampling import sample
from memorization.similarity.judge import Judge, read_picture

SCORED_BY = "anisotropy"


class Side(NamedTuple):
    """A case before or after: pictures, uint8 ``(prompts, images, h, w, 3)``, and what is measured of each prompt."""

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
    scores = scores_of(case, remedy)
    measured = [
        {"score": score, **judge(own, prompt, path)}
        for score, own, prompt, path in zip(scores, pictures, case.prompts, training, strict=True)
    ]
    return Side(pictures, measured, round(seconds, 3))


@torch.no_grad()
def scores_of(case: Case, remedy: Remedy, name: str = SCORED_BY) -> list[float]:
    """Mean score of every prompt under the remedy's embedding, on the remedy's own noise."""
    own = [replace(case, noise=latents).score(name, remedy.embeds[i : i + 1]).item()
           for i, latents in enumerate(remedy.latents)]  # fmt: skip
    return [float(f"{score:.6g}") for score in own]


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
    remedy = mitigation(case)
    seconds = (time.perf_counter() - started) / len(case.prompts)
    if before is None:
        before = side(case, Remedy.unchanged(case), judge, training)
    return Outcome(remedy, before, side(case, remedy, judge, training), round(seconds, 3))


def run_mitigation(
    case_of: Callable[[list[str]], Case],
    mitigation: Mitigation,
    prompts: pd.DataFrame,
    judge: Judge,
    store: ResultStore,
    *,
    at_once: int,
) -> None:
    """Mitigate ``prompts`` into ``store``, from where it stopped.

    Their columns: ``prompt``, and ``picture``, the file of the training picture or None.

    Beside the lines go ``images/<id>-before-<n>.png``, ``images/<id>-after-<n>.png`` and ``embeds/<id>.safetensors``
    (``prompt_embeds``, and ``latents`` where the remedy is other noise).
    """
    if store.done == len(prompts):
        return
    store.start()
    for name in ("images", "embeds"):
        (store.folder / name).mkdir(exist_ok=True)
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
    tensors = {"prompt_embeds": outcome.remedy.embeds[i : i + 1].contiguous()}
    if not torch.equal(outcome.remedy.latents[i], case.noise):
        tensors["latents"] = outcome.remedy.latents[i].contiguous()
    save_file(tensors, folder / "embeds" / f"{number:04d}.safetensors")


def contact_sheet(folder: Path, rows: list[dict], images: Sequence[Path | None], path: Path, limit: int = 16) -> Path:
    """Training picture, before and after, a row a prompt."""
    rows = rows[:limit]
    count = len(list((folder / "images").glob("0000-before-*.png")))
    figure, axes = plt.subplots(
        len(rows), 3, figsize=(1.1 * (1 + 2 * count), 1.25 * len(rows)), width_ratios=[1, count, count], squeeze=False
    )
    for row, image, (left, middle, right) in zip(rows, images, axes, strict=False):
        for axis, when in ((middle, "before"), (right, "after")):
            pictures = [Image.open(folder / "images" / f"{row['id']:04d}-{when}-{n}.png") for n in range(count)]
            axis.imshow(np.concatenate([np.asarray(picture) for picture in pictures], axis=1))
        if image is not None:
            left.imshow(read_picture(image, pictures[0].size[::-1]))
        middle.set_title(f"{row['prompt'][:60]}: {row['score_before']:.3g}", fontsize=7, loc="left", pad=2)
        right.set_title(f"{row['new_prompt'][:60]}: {row['score_after']:.3g}", fontsize=7, loc="left", pad=2)
    for axis in axes.flat:
        axis.axis("off")
    axes[0, 0].set_title("training", fontsize=7, pad=2)
    figure.suptitle("training picture | before | after: score", fontsize=8)
    return save_figure(figure, path)
