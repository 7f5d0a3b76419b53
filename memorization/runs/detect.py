"""Score a list of prompts, or of pictures, into a folder or into memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pandas as pd
from transformers import CLIPTokenizer

from memorization.detectors.base import DETECTORS, Detector, make_detectors
from memorization.errors import InputError
from memorization.evaluation.bands import ROUNDS
from memorization.evaluation.calibration import Calibration
from memorization.io.prompts import Listed
from memorization.models.base import TextToImage, split_able
from memorization.models.loading import Model, revision_of
from memorization.models.spec import ModelSpec
from memorization.paths import in_project
from memorization.runs.cases import calibrated_settings
from memorization.runs.memory import default_batch_size, measure_batch_size, with_memory
from memorization.runs.pictures import PictureScorer
from memorization.runs.processes import open_store
from memorization.runs.scorer import Scorer, SequentialScorer
from memorization.runs.store import Store
from memorization.settings import Checked, Count, NotNegative, Seed, Steps, fitted

KEPT = ("label", "family", "kind", "duplicates", "replication", "split")  # columns of a list that scores keep


AnyScorer = Scorer | SequentialScorer | PictureScorer


@dataclass(frozen=True)
class Scoring(Checked):
    """How prompts are scored: everything but the model, the list and the detectors.

    Args:
        noises: a prompt.
        seed: of the noise; the default is the public code's.
        steps: of the DDIM grid that places the timesteps, and of the generation that some detectors read.
        guidance_scale: of that generation; None for the model's own.
        batch_size: rows (prompt x noise) to a UNet call; None to measure. Halved on out of memory.
        sequential: 1, 2, 4, 8 noises, more for undecided prompts alone; needs a calibration made with 8.
    """

    noises: Count = 1
    seed: Seed = 51
    steps: Steps = 50
    guidance_scale: NotNegative | None = None
    batch_size: Count | None = None
    sequential: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sequential:
            object.__setattr__(self, "noises", ROUNDS[-1])


def configured_detectors(
    names: Sequence[str], asked: Mapping[str, Mapping], spec: ModelSpec, calibration: Calibration, holds_for: Mapping
) -> list[Detector]:
    """Detectors with the model's settings, over them the calibrated ones, over them those that were ``asked`` for.

    Args:
        holds_for: what the calibration has to hold for, besides the settings.

    Raises:
        InputError: there is none of a name or such a setting, settings are of another detector, or the calibration
            holds for something else.
    """
    asked = {name: fitted(DETECTORS.find(name), values, name) for name, values in asked.items()}
    if idle := [name for name in asked if not {name, "all"} & set(names)]:
        raise InputError(f"settings of {idle[0]}, which is not among the detectors: {', '.join(names)}")
    calibration.check(holds_for, asked)
    of_model = spec.settings_of("detectors", DETECTORS)
    layers = (of_model, calibrated_settings(calibration), asked)
    known = {name for layer in layers for name in layer}
    return make_detectors(
        names, {name: {k: v for layer in layers for k, v in layer.get(name, {}).items()} for name in known}
    )


def able_detectors(
    pipe: TextToImage, detectors: Sequence[Detector], names: Sequence[str]
) -> tuple[list[Detector], list[str]]:
    """Those that a model can do, and a line for each that was left out; where all were asked for, not by name.

    Raises:
        InputError: one that was named cannot be done; or none can.
    """
    able, lines = split_able(pipe, detectors)
    if lines and (list(names) != ["all"] or not able):
        raise InputError(lines[0])
    return able, lines


def deciding(detectors: Sequence[Detector]) -> str | None:
    """The score by which prompts are ranked and flagged: the first detector's; None where all keep curves alone."""
    return next((detector.name for detector in detectors if detector.terms), None)


def detect(
    model: Model,
    listed: Listed,
    detectors: Sequence[Detector],
    scoring: Scoring,
    *,
    calibration: Calibration,
    out: Path | None = None,
    overwrite: bool = False,
) -> Store:
    """Score a list, from where it stopped; the store holds its lines afterwards, in each process that took part.

    Args:
        listed: prompts, or the pictures of :func:`~memorization.runs.pictures.read_pictures`.
        out: the run's folder; None to keep the lines in memory.
        overwrite: start anew in a folder that holds a run.

    Raises:
        InputError: the folder holds another run, the calibration is of another model or other adapters, memory does not
            suffice for one row, or a value is not finite.
    """
    pipe = model.pipe
    revision = revision_of(pipe, pictures="images" in listed.hashes)
    calibration.check_revision(revision)
    make_scorer, further = _scorer_for(model, listed, detectors, scoring, calibration)
    settings = {
        "model": model.name, "revision": revision, "prompts": listed.hashes,
        "detectors": {detector.name: detector.record() for detector in detectors}, "num_images": scoring.noises,
        "seed": scoring.seed, "steps": scoring.steps, "dtype": model.dtype, "batch_size": scoring.batch_size or "auto",
        **further,
        **({"contrast": pipe.contrast} if pipe.contrast else {}),
    }  # fmt: skip
    info = {**model.where, "checkpoint": in_project(Path(pipe.config["_name_or_path"])),
            "thresholds": calibration.thresholds}  # fmt: skip
    with open_store(out, settings, info, overwrite) as store:
        run_detection(make_scorer, listed.frame, store, batch_size=scoring.batch_size or default_batch_size(pipe),
                      measure=scoring.batch_size is None)  # fmt: skip
    return store


def _scorer_for(
    model: Model, listed: Listed, detectors: Sequence[Detector], scoring: Scoring, calibration: Calibration
) -> tuple[Callable[..., AnyScorer], dict]:
    """What makes the scorer for a batch size, and the settings that matter to it alone."""
    if "images" in listed.hashes:
        return partial(PictureScorer, model.pipe, detectors), {}
    scale = model.spec.scale if scoring.guidance_scale is None else scoring.guidance_scale
    common = {"seed": scoring.seed, "steps": scoring.steps, "guidance_scale": scale}
    generates = any(detector.needs in ("generation", "image") for detector in detectors)
    further: dict = {"guidance_scale": scale} if generates else {}
    if not scoring.sequential:
        return partial(Scorer, model.pipe, detectors, noises=scoring.noises, **common), further
    first = deciding(detectors) or ""
    bands = calibration.bands(first)
    further["sequential"] = {"detector": first, "bands": [[n, *band] for n, band in bands.items()]}
    return partial(SequentialScorer, model.pipe, detectors, detector=first, bands=bands, **common), further


def run_detection(
    make_scorer: Callable[..., AnyScorer], frame: pd.DataFrame, store: Store, *, batch_size: int, measure: bool = False
) -> None:
    """Score the rows of ``frame`` into ``store``, from where it stopped, by ``make_scorer(batch_size=...)``.

    Args:
        batch_size: rows to a UNet call, or the first that is tried.
        measure: find the fastest, where the run has not done so before.

    Raises:
        InputError: the store holds more lines than ``frame``, not even one row fits into memory, or the model gave a
            value that is not finite.
    """
    if not store.lacks(len(frame)):
        return
    store.start()
    lines = _ScoredLines(make_scorer, frame, store)
    if measure and "batch_size_used" not in store.record:
        measure_batch_size(lines, store, len(frame), batch_size)
        if not store.lacks(len(frame)):
            return
    with_memory(lines.make_all, store, batch_size)


class _ScoredLines:
    """Makes the lines of a list."""

    def __init__(self, make_scorer: Callable[..., AnyScorer], frame: pd.DataFrame, store: Store) -> None:
        self._make_scorer, self._frame, self._store = make_scorer, frame, store
        self._keep = [column for column in KEPT if column in frame]
        self._scorer: AnyScorer | None = None
        self._made_for = 0  # rows to a UNet call

    def make_all(self, size: int) -> None:
        """All that are missing. What the scorer itself computes is computed with this size too, as on resume."""
        if self._made_for != size:
            self._scorer = None
        scorer = self._sized(size)
        for numbers in self._store.batches(len(self._frame), scorer.prompts_at_once, unit=scorer.columns[0]):
            self.make(numbers, size)

    def at_once(self, size: int) -> int:
        """Lines to a batch."""
        return self._sized(size).prompts_at_once

    def make(self, numbers: range, size: int) -> None:
        """A batch."""
        scorer, batch = self._sized(size), self._frame.iloc[numbers.start : numbers.stop]
        scores = scorer(*(batch[column].tolist() for column in scorer.columns))
        self._store.add([
            {"id": number, "prompt": row["prompt"],
             **({"image": Path(row["image"]).name} if "image" in scorer.columns else {}),
             **{column: row[column] for column in self._keep}, **values}
            for number, row, values in zip(numbers, batch.to_dict("records"), scores, strict=True)
        ])  # fmt: skip

    def _sized(self, size: int) -> AnyScorer:
        """The scorer, with so many rows to a UNet call."""
        if self._scorer is None:
            self._scorer, self._made_for = self._make_scorer(batch_size=size), size
        for one in self._scorer.scorers if isinstance(self._scorer, SequentialScorer) else [self._scorer]:
            one.batch_size = size
        return self._scorer


def notes_on(pipe: TextToImage, frame: pd.DataFrame) -> str:
    """What a user should know of a list, in one line."""
    prompts = frame["prompt"].tolist()
    notes = {
        "blank lines skipped": frame.attrs.get("blank_lines", 0),
        "duplicated prompts": len(prompts) - len(set(prompts)),
    }
    if "text" in pipe.can:  # with several tokenizers, what one cuts off another may read
        limit = pipe.tokenizer.model_max_length
        notes[f"prompts over {limit} tokens (cut off)"] = _count_longer(pipe.tokenizer, prompts, limit)
    said = [f"{count} {what}" for what, count in notes.items() if count]
    return f"{len(prompts)} prompts" + (": " + ", ".join(said) if said else "")


def _count_longer(tokenizer: CLIPTokenizer, prompts: Sequence[str], limit: int) -> int:
    """How many prompts have more than ``limit`` tokens, those of beginning and end among them."""
    # A token is a letter or more, and most prompts are short: counting the tokens of a million takes minutes.
    long = [prompt for prompt in prompts if not prompt.isascii() or len(prompt) > limit - 2]
    count = 0
    for start in range(0, len(long), 10_000):
        ids = tokenizer(long[start : start + 10_000], truncation=False, verbose=False).input_ids
        count += sum(len(own) > limit for own in ids)
    return count
