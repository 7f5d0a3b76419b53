"""Mitigate a list of prompts, with pictures and measurements before and after, into a folder or into memory."""

from __future__ import annotations

import hashlib
import math
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from memorization.detectors.base import SCORED_BY
from memorization.errors import InputError
from memorization.evaluation.calibration import Calibration
from memorization.index.build import own_index
from memorization.io.figures import save_figure
from memorization.io.pictures import read_picture
from memorization.io.prompts import picture_files, read_prompts
from memorization.mitigations.base import MITIGATIONS, Mitigation
from memorization.mitigations.case import Case, Remedy
from memorization.models.loading import Model, revision_of
from memorization.models.spec import ModelSpec
from memorization.runs.cases import Cases, scoring_detectors
from memorization.runs.memory import default_batch_size, with_memory
from memorization.runs.sampling import sample
from memorization.runs.store import MemoryStore, ResultStore, Store
from memorization.settings import Checked, Count, NotNegative, Seed, Steps, fitted
from memorization.similarity.judge import Judge, make_judge

NOISES = 4  # a prompt, where nothing is calibrated


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

    def pictures(self, i: int) -> dict[str, np.ndarray]:
        """Those of prompt ``i``, uint8 ``(noises, h, w, 3)``, before and after."""
        return {"before": self.before.pictures[i], "after": self.after.pictures[i]}

    def changed(self, case: Case, i: int) -> dict[str, Tensor]:
        """What the remedy changed of prompt ``i``, as :meth:`KeptInMemory.tensors`."""
        embeds, latents = self.remedy.embeds[i], self.remedy.latents[i]
        found = {}
        if not torch.equal(embeds, case.embeds[i]):
            found["prompt_embeds"] = embeds[None].contiguous()
        if not torch.equal(latents, case.noise):
            found["latents"] = latents.contiguous()
        return found

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


def flagged(cases: Cases, prompts: Sequence[str], threshold: float) -> list[bool]:
    """Which prompts score at or above ``threshold``."""
    scores = []
    starts = range(0, len(prompts), cases.at_once)
    for start in tqdm(starts, desc="score", disable=len(starts) <= 1):
        case = cases(prompts[start : start + cases.at_once])
        scores += scores_of(case, Remedy.unchanged(case))
    return [score >= threshold for score in scores]


@dataclass(frozen=True)
class Mitigating(Checked):
    """How a list is mitigated: everything but the model, the list and the method.

    Args:
        noises: a prompt; None for as many as the calibration holds for, else 4.
        seed: of the noise, and of what a method draws.
        steps: of a generation.
        guidance_scale: None for the model's own.
        batch_size: rows to a UNet call; None to choose by device. Halved on out of memory.
        threshold: score from which on a prompt is mitigated; ``auto`` for the calibrated one, None for all prompts.
        limit: the first so many of these prompts; None for all.
    """

    noises: Count | None = None
    seed: Seed = 51
    steps: Steps = 50
    guidance_scale: NotNegative | None = None
    batch_size: Count | None = None
    threshold: float | Literal["auto"] | None = "auto"
    limit: Count | None = None

    def calibrated(self, name: str, mitigation: Mitigation, calibration: Calibration) -> Mitigating:
        """The same with the number of noises and the threshold that the calibration gives.

        Args:
            name: of the model, as it was asked for.

        Raises:
            InputError: what is needed of the calibration is not there, or holds for something else.
        """
        noises = self.noises or calibration.holds_for.get("num_images", NOISES)
        threshold = self.threshold
        if threshold == "auto":
            if SCORED_BY not in calibration.thresholds:
                raise InputError("no calibrated threshold: give --calibration FILE (by detect_eval.py --calibrate), "
                                 "--threshold X or --all")  # fmt: skip
            threshold = calibration.thresholds[SCORED_BY]
        if mitigation.needs_level:
            mitigation.bound(calibration.levels)
        if mitigation.needs_level or self.threshold == "auto":
            calibration.check({"model": name, "num_images": noises})
        return replace(self, noises=noises, threshold=threshold)


def configured_mitigation(
    name: str, asked: Mapping[str, object], spec: ModelSpec, index: Path | None = None
) -> Mitigation:
    """A mitigation with the model's settings, over them those that were ``asked`` for.

    Args:
        index: of training pictures, for methods that need one; None for that of the model's own list.

    Raises:
        InputError: there is no such method or setting, or no index where one is needed.
    """
    cls = MITIGATIONS.find(name)
    settings = fitted(cls, {**spec.settings_of("mitigations").get(name, {}), **asked}, name)
    if cls.needs_index:
        if index or "index" not in settings:
            settings["index"] = str(index or own_index(spec))
    elif index:
        takers = ", ".join(other for other, one in MITIGATIONS.items() if one.needs_index)
        raise InputError(f"--index is for {takers}, not {name}")
    return MITIGATIONS.make(name, settings)


class Prompts(NamedTuple):
    """What is to be mitigated.

    Attributes:
        frame: a row a prompt: ``prompt``, and ``picture``, the file of its training picture or None.
        known: files of all training pictures that are known; nearness is measured against them.
    """

    frame: pd.DataFrame
    known: list[Path]


def prompts_of(spec: ModelSpec, path: Path | None) -> Prompts:
    """Those of a list, or of the model's own.

    Raises:
        InputError: there is no list, or a training picture that it names is missing.
    """
    listed = path or spec.own_list()
    if listed is None:
        raise InputError(f"model {spec.name!r} has no list of its own: give --prompts FILE")
    frame = read_prompts(listed)
    frame["picture"] = picture_files(frame, listed)
    known = [picture for picture in frame["picture"] if picture]
    return Prompts(frame, known if listed == spec.own_list() else known + own_pictures(spec))


def own_pictures(spec: ModelSpec) -> list[Path]:
    """The training pictures that the model's own list names; none where it has no list."""
    own = spec.own_list()
    return [picture for picture in picture_files(read_prompts(own), own) if picture] if own and own.is_file() else []


class Mitigated(NamedTuple):
    """What came of a list.

    Attributes:
        rows: a line a prompt, as in ``mitigations.jsonl``.
        frame: the prompts that were mitigated.
        kept: their pictures and tensors; None where nothing was.
        noises: a prompt.
    """

    rows: list[dict]
    frame: pd.DataFrame
    kept: Kept | None
    noises: int


def mitigate_list(
    model: Model,
    prompts: Prompts,
    mitigation: Mitigation,
    plan: Mitigating,
    *,
    calibration: Calibration,
    clip: str | None = None,
    sscd: str = "official-288",
    out: Path | None = None,
    overwrite: bool = False,
) -> Mitigated:
    """Mitigate a list, from where it stopped.

    Args:
        clip: checkpoint that judges text alignment; None for the model's own, ``none`` for none.
        sscd: how SSCD is given pictures.
        out: the run's folder; None to keep everything in memory.
        overwrite: start anew in a folder that holds a run.

    Raises:
        InputError: something needed of the calibration is missing, the folder holds another run, memory does not
            suffice, or a number is not finite.
    """
    pipe, spec = model.pipe, model.spec
    plan = plan.calibrated(model.name, mitigation, calibration)
    if model.dtype == "float16" and mitigation.lowers:
        raise InputError(f"{mitigation.name}: gradients are lost in float16; give --dtype float32 or bfloat16")
    if pipe.device.type == "cuda":
        pipe.unet.enable_gradient_checkpointing()  # acts where gradients are asked for alone
    cases = Cases(
        pipe, pipe.pure_noise(plan.noises, plan.seed), plan.steps,
        spec.guidance_scale if plan.guidance_scale is None else plan.guidance_scale,
        plan.seed, plan.batch_size or default_batch_size(pipe), scoring_detectors([mitigation], spec, calibration),
        calibration.levels, calibration.holds_for.get("steps", 50),
    )  # fmt: skip
    frame = prompts.frame
    if plan.threshold is not None:
        frame = frame[flagged(cases, frame["prompt"].tolist(), plan.threshold)].reset_index(drop=True)
    frame = frame[: plan.limit]
    if frame.empty:
        return Mitigated([], frame, None, len(cases.noise))
    judge = make_judge(pipe, prompts.known, spec.clip if clip is None else clip, sscd)
    settings = {
        "model": model.name, "revision": revision_of(pipe), "method": mitigation.name, **mitigation.record(),
        "level": mitigation.bound(calibration.levels) if mitigation.needs_level else None,
        "threshold": plan.threshold,
        "prompts": hashlib.sha256("\n".join(frame["prompt"]).encode()).hexdigest(), "num_images": plan.noises,
        "seed": plan.seed, "steps": plan.steps, "grid_steps": cases.grid_steps,
        "guidance_scale": cases.guidance_scale, "dtype": model.dtype, "batch_size": cases.batch_size,
        SCORED_BY: vars(cases.detectors[SCORED_BY]), "judge": judge.description,
    }  # fmt: skip
    info = {"device": str(pipe.device)}
    kept = KeptInFolder(out) if out else KeptInMemory()
    with ResultStore(out, settings, info, overwrite, "mitigations.jsonl") if out else MemoryStore(settings) as store:
        run_mitigation(cases, mitigation, frame, judge, store, kept)
    return Mitigated(store.rows, frame, kept, len(cases.noise))


class KeptInMemory:
    """Pictures and tensors of a run, by the number of the prompt."""

    def __init__(self) -> None:
        self._pictures: dict[int, dict[str, np.ndarray]] = {}
        self._tensors: dict[int, dict[str, Tensor]] = {}

    def start(self, anew: bool) -> None:
        """Nothing to make ready."""

    def add(self, number: int, pictures: dict[str, np.ndarray], tensors: dict[str, Tensor]) -> None:
        """Keep what came of a prompt: pictures ``before`` and ``after``, and the tensors that were changed."""
        self._pictures[number], self._tensors[number] = pictures, tensors

    def pictures(self, number: int, when: str) -> np.ndarray:
        """uint8 ``(noises, h, w, 3)``."""
        return self._pictures[number][when]

    def tensors(self, number: int) -> dict[str, Tensor]:
        """``prompt_embeds (1, tokens, width)`` and ``latents (noises, c, h, w)``, whichever the remedy changed."""
        return self._tensors[number]


class KeptInFolder:
    """The same as files: ``images/<id>-before-<n>.png``, ``images/<id>-after-<n>.png``, ``embeds/<id>.safetensors``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def start(self, anew: bool) -> None:
        """Make the folders; ``anew``: without what a run that was overwritten left there."""
        for name in ("images", "embeds"):
            if anew:
                shutil.rmtree(self.folder / name, ignore_errors=True)
            (self.folder / name).mkdir(exist_ok=True)

    def add(self, number: int, pictures: dict[str, np.ndarray], tensors: dict[str, Tensor]) -> None:
        """As :meth:`KeptInMemory.add`; no file of tensors where the remedy changed none."""
        for when, own in pictures.items():
            for n, picture in enumerate(own):
                Image.fromarray(picture).save(self._picture(number, when, n))
        if tensors:  # a file with the memorized prompt's own embedding would be no remedy
            save_file(tensors, self._tensors(number))

    def pictures(self, number: int, when: str) -> np.ndarray:
        """As :meth:`KeptInMemory.pictures`."""
        count = len(list((self.folder / "images").glob(f"{number:04d}-{when}-*.png")))
        return np.stack([read_picture(self._picture(number, when, n), None) for n in range(count)])

    def tensors(self, number: int) -> dict[str, Tensor]:
        """As :meth:`KeptInMemory.tensors`."""
        return load_file(self._tensors(number)) if self._tensors(number).is_file() else {}

    def _picture(self, number: int, when: str, n: int) -> Path:
        return self.folder / "images" / f"{number:04d}-{when}-{n}.png"

    def _tensors(self, number: int) -> Path:
        return self.folder / "embeds" / f"{number:04d}.safetensors"


Kept = KeptInFolder | KeptInMemory


def run_mitigation(
    cases: Cases, mitigation: Mitigation, frame: pd.DataFrame, judge: Judge, store: Store, kept: Kept
) -> None:
    """Mitigate the prompts of ``frame`` into ``store``, from where it stopped; pictures and tensors go to ``kept``.

    On out of memory the batch size is halved.
    """
    if store.done == len(frame):
        return
    store.start()
    kept.start(anew=store.done == 0)

    def work(size: int) -> None:
        _mitigate_all(replace(cases, batch_size=size), mitigation, frame, judge, store, kept)

    with_memory(work, store, cases.batch_size)


def _mitigate_all(
    cases: Cases, mitigation: Mitigation, frame: pd.DataFrame, judge: Judge, store: Store, kept: Kept
) -> None:
    size = cases.at_once
    with tqdm(total=len(frame), initial=store.done, desc=store.name, unit="prompt", smoothing=0) as bar:
        for start in range(store.done // size * size, len(frame), size):
            batch = frame.iloc[start : start + size]
            case = cases(batch["prompt"].tolist())
            outcome = mitigate(case, mitigation, judge, batch["picture"].tolist())
            rows = [{"id": start + i, **row} for i, row in enumerate(outcome.rows(case.prompts))]
            for i, row in enumerate(rows):
                kept.add(row["id"], outcome.pictures(i), outcome.changed(case, i))
            missing = rows[store.done - start :]
            store.append(missing)
            bar.update(len(missing))


def contact_sheet(
    kept: Kept, rows: list[dict], training: Sequence[Path | None], count: int, path: Path, limit: int = 16
) -> Path:
    """Training picture, ``count`` pictures before and as many after, a row a prompt."""
    rows = rows[:limit]
    figure, axes = plt.subplots(
        len(rows), 3, figsize=(1.1 * (1 + 2 * count), 1.25 * len(rows)), width_ratios=[1, count, count], squeeze=False
    )
    for row, image, (left, middle, right) in zip(rows, training, axes, strict=False):
        for axis, key, when in ((middle, "prompt", "before"), (right, "new_prompt", "after")):
            pictures = kept.pictures(row["id"], when)
            axis.imshow(np.concatenate(list(pictures), axis=1))
            score = f": {row[f'score_{when}']:.3g}" if f"score_{when}" in row else ""
            axis.set_title(row[key][:60] + score, fontsize=7, loc="left", pad=2, parse_math=False)
        if image is not None:
            left.imshow(read_picture(image, pictures.shape[1:3]))
    for axis in axes.flat:
        axis.axis("off")
    axes[0, 0].set_title("training", fontsize=7, pad=2)
    figure.suptitle("training picture | before | after: score", fontsize=8)
    return save_figure(figure, path)
