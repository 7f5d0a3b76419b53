"""Mitigate a list of prompts, with pictures and measurements before and after, into a folder or into memory."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

import pandas as pd
from tqdm import tqdm

from memorization.detectors.base import SCORED_BY
from memorization.errors import InputError
from memorization.evaluation.calibration import Calibration
from memorization.index.build import own_index
from memorization.io.prompts import picture_files, read_prompts
from memorization.mitigations.base import MITIGATIONS, Mitigation
from memorization.mitigations.case import Remedy
from memorization.models.base import check_able
from memorization.models.loading import Model, revision_of
from memorization.models.spec import ModelSpec
from memorization.runs.cases import Cases, scoring_detectors
from memorization.runs.kept import Kept, KeptInFolder, KeptInMemory
from memorization.runs.memory import default_batch_size, with_memory
from memorization.runs.outcome import mitigate, scores_of
from memorization.runs.processes import open_store
from memorization.runs.store import Store
from memorization.settings import Checked, Count, NotNegative, Seed, Steps, fitted
from memorization.similarity.judge import Judge, make_judge

NOISES = 4  # a prompt, where nothing is calibrated


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

    def calibrated(
        self, name: str, mitigation: Mitigation, calibration: Calibration
    ) -> tuple[int, float | None, float | None]:
        """(noises, threshold or None, score to reach or None) that the calibration gives.

        Args:
            name: of the model, as it was asked for.

        Raises:
            InputError: what is needed of the calibration is not there, or holds for something else.
        """
        noises = self.noises or calibration.holds_for.get("num_images", NOISES)
        threshold = None if self.threshold == "auto" else self.threshold
        if self.threshold == "auto":
            if SCORED_BY not in calibration.thresholds:
                raise InputError("no calibrated threshold: give --calibration FILE (by detect_eval.py --calibrate), "
                                 "--threshold X or --all")  # fmt: skip
            threshold = calibration.thresholds[SCORED_BY]
        level = mitigation.bound(calibration.levels) if mitigation.needs_level else None
        if self.reads_calibration(mitigation):
            calibration.check({"model": name, "num_images": noises})
        return noises, threshold, level

    def reads_calibration(self, mitigation: Mitigation) -> bool:
        """Whether a threshold or a level of the calibration is taken."""
        return bool(mitigation.needs_level) or self.threshold == "auto"


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
    settings = fitted(cls, {**spec.settings_of("mitigations", MITIGATIONS).get(name, {}), **asked}, name)
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
    spec = model.spec
    check_able(model.pipe, [mitigation])
    noises, threshold, level = plan.calibrated(model.name, mitigation, calibration)
    revision = revision_of(model.pipe, pictures=True)
    if plan.reads_calibration(mitigation):
        calibration.check_revision(revision)
    if model.dtype == "float16" and mitigation.lowers:
        raise InputError(f"{mitigation.name}: gradients are lost in float16; give --dtype float32 or bfloat16")
    if model.pipe.device.type == "cuda":
        model.pipe.denoiser.enable_gradient_checkpointing()  # acts where gradients are asked for alone
    cases = _cases_for(model, mitigation, plan, noises, calibration)
    frame = prompts.frame
    if threshold is not None:
        frame = frame[flagged(cases, frame["prompt"].tolist(), threshold)].reset_index(drop=True)
    frame = frame[: plan.limit]
    if frame.empty:
        return Mitigated([], frame, None, noises)
    judge = make_judge(model.pipe, prompts.known, spec.clip if clip is None else clip, sscd)
    settings = {
        "model": model.name, "revision": revision,
        "method": mitigation.name, **mitigation.record(), "level": level, "threshold": threshold,
        "prompts": hashlib.sha256("\n".join(frame["prompt"]).encode()).hexdigest(), "num_images": noises,
        "seed": plan.seed, "steps": plan.steps, "grid_steps": cases.grid_steps,
        "guidance_scale": cases.guidance_scale, "dtype": model.dtype, "batch_size": cases.batch_size,
        **({"contrast": model.pipe.contrast} if model.pipe.contrast else {}),
        SCORED_BY: vars(cases.detectors[SCORED_BY]), "judge": judge.description,
    }  # fmt: skip
    kept = KeptInFolder(out) if out else KeptInMemory()
    with open_store(out, settings, model.where, overwrite, "mitigations.jsonl") as store:
        run_mitigation(cases, mitigation, frame, judge, store, kept)
    return Mitigated(store.rows, frame, kept, noises)


def _cases_for(model: Model, mitigation: Mitigation, plan: Mitigating, noises: int, calibration: Calibration) -> Cases:
    """The cases of a run; detectors read the grid that they were calibrated on."""
    return Cases(
        model.pipe,
        model.pipe.pure_noise(noises, plan.seed),
        plan.steps,
        model.spec.scale if plan.guidance_scale is None else plan.guidance_scale,
        plan.seed,
        plan.batch_size or default_batch_size(model.pipe),
        scoring_detectors([mitigation], model.spec, calibration),
        calibration.levels,
        calibration.holds_for.get("steps", 50),
    )


def run_mitigation(
    cases: Cases, mitigation: Mitigation, frame: pd.DataFrame, judge: Judge, store: Store, kept: Kept
) -> None:
    """Mitigate the prompts of ``frame`` into ``store``, from where it stopped; pictures and tensors go to ``kept``.

    On out of memory the batch size is halved.
    """
    if not store.lacks(len(frame)):
        return
    store.start()
    kept.start(anew=store.anew)

    def work(size: int) -> None:
        _mitigate_all(replace(cases, batch_size=size), mitigation, frame, judge, store, kept)

    with_memory(work, store, cases.batch_size)


def _mitigate_all(
    cases: Cases, mitigation: Mitigation, frame: pd.DataFrame, judge: Judge, store: Store, kept: Kept
) -> None:
    for numbers in store.batches(len(frame), cases.at_once):
        batch = frame.iloc[numbers.start : numbers.stop]
        case = cases(batch["prompt"].tolist())
        outcome = mitigate(case, mitigation, judge, batch["picture"].tolist())
        for i, number in enumerate(numbers):
            kept.add(number, outcome.pictures(i), outcome.changed(case, i))
        store.add([{"id": number, **row} for number, row in zip(numbers, outcome.rows(case.prompts), strict=True)])
