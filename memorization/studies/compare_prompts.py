"""Comparing mitigations on the prompts of a labelled list: memorized and ordinary ones, all from the same noises."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, cached_property, partial
from pathlib import Path

import pandas as pd

from local_sd_pipeline import LocalStableDiffusionPipeline
from memorization.detectors.base import OneStepDetector
from memorization.errors import InputError
from memorization.evaluation.calibration import Calibration, read_calibration
from memorization.flags import ArgumentParser, add_flags, value
from memorization.index.store import Index
from memorization.io.prompts import picture_files
from memorization.mitigations.base import MITIGATIONS, Mitigation
from memorization.mitigations.case import Case, Remedy
from memorization.runs.attack import Attack
from memorization.runs.cases import Cases, scoring_detectors
from memorization.runs.memory import default_batch_size
from memorization.runs.mitigate import NOISES, configured_mitigation, prompts_of
from memorization.runs.outcome import side
from memorization.runs.store import ResultStore
from memorization.settings import Count
from memorization.similarity.frechet import Reference
from memorization.similarity.judge import Measure, copy_limits, make_judge
from memorization.similarity.nl2 import NEIGHBOURS
from memorization.studies.compare import PLAIN, Batch, Comparison, Item, Made, Row
from memorization.studies.labelled import add_arguments, open_subject


def add_comparison_arguments(parser: ArgumentParser, *, memorized: int) -> None:
    """Flags of every comparison on prompts; ``memorized``: the default of its flag."""
    add_arguments(parser)
    parser.set_defaults(split="test")
    add, count = parser.add_argument, value(Count)
    add("--memorized", type=count, default=memorized, metavar="N", help="memorized prompts (default: %(default)s)")
    add("--ordinary", type=count, default=8, metavar="N", help="prompts that are not (default: %(default)s)")
    add("--noises", "--num-images", "--images", dest="noises", type=count, metavar="N",
        help=f"a prompt (default: those that the model's calibration holds for, else {NOISES})")  # fmt: skip
    add_flags(parser, "--steps", default=15, help="of a generation (default: %(default)s)")
    add_flags(parser, "--index", "--resamples")
    add("--reference", type=Path, metavar="INDEX", help="pixels of pictures as they should look, for the Frechet "
        "distance (default: the model's config)")  # fmt: skip


def chosen_prompts(frame: pd.DataFrame, memorized: int, ordinary: int) -> pd.DataFrame:
    """As many prompts of either label, drawn by a seed; the memorized ones with a training picture."""
    mixed = frame.sample(frac=1, random_state=0)
    copied = mixed[(mixed["label"] == 1) & mixed["picture"].notna()].head(memorized)
    return pd.concat([copied, mixed[mixed["label"] == 0].head(ordinary)]).reset_index(drop=True)


class Bench:
    """A model, the prompts and noises of a comparison, and the judge.

    Args:
        args: flags of :func:`add_comparison_arguments`.
        study: names the default folder.
        measures: of the judge, beside its own.

    Raises:
        InputError: the flags make no sense, or the list or the model's config lacks what is needed.
    """

    def __init__(self, args: argparse.Namespace, study: str, measures: Mapping[str, Measure] | None = None) -> None:
        self.args, self.subject = args, open_subject(args, study, pictures=True)
        self.spec, self.out = self.subject.spec, self.subject.out
        listed, frame = self.subject.listed, self.subject.frame
        frame = frame.assign(picture=picture_files(frame, listed))
        frame = chosen_prompts(frame, args.memorized, args.ordinary)
        if not 0 < (frame["label"] == 1).sum() < len(frame):
            raise InputError(f"{listed}: no memorized prompt with a training picture, or no other prompt, was chosen")
        families = frame["family"] if "family" in frame else frame["prompt"]
        columns = (frame["prompt"], frame["label"].tolist(), families, frame["picture"])
        self.items = [Item(*values) for values in zip(*columns, strict=True)]
        known = prompts_of(self.spec, args.prompts).known
        self.judge = make_judge(self.subject.pipe, known, self.spec.clip, others=measures)
        self.limits = copy_limits(self.spec.copy_limits)
        if not set(self.limits) & set(self.judge.measures):
            raise InputError(f"{listed}: names {len(known)} training pictures; copies are counted by nL2, which needs "
                             f"{NEIGHBOURS}, or by SSCD, which needs its weights")  # fmt: skip
        self.calibration = read_calibration(Path(self.spec.calibration)) if self.spec.calibration else Calibration()
        self.noises = args.noises or self.calibration.holds_for.get("num_images", NOISES)
        self.detectors: dict[str, OneStepDetector] = {}
        self._case = cache(self._make_case)  # what it holds of the detectors serves every row

    @property
    def title(self) -> str:
        """Of the trade-off curve."""
        memorized = sum(item.label for item in self.items)
        return f"{self.spec.name}: {memorized} memorized prompts, {self.noises} noises each"

    @property
    def settings(self) -> dict:
        """Everything that all rows depend on, for the run's settings."""
        return {
            **self.subject.settings,
            **{name: vars(self.args)[name] for name in ("memorized", "ordinary", "steps")},
            "num_images": self.noises, "guidance_scale": self.spec.scale, "levels": self.calibration.levels,
            "judge": self.judge.description, "reference": self.reference and self.reference.digest,
        }  # fmt: skip

    def row(self, method: str, settings: Mapping[str, object], name: str, line: str = "") -> Row:
        """A row by a method with the model's own settings for it, ``settings`` on top, and an index where it needs one.

        Args:
            name: of the row.
            line: of the trade-off curve; default: the method's.

        Raises:
            InputError: there is no such method or setting, or it needs a calibration that holds for something else.
        """
        index = self.args.index if MITIGATIONS.find(method).needs_index else None
        mitigation = configured_mitigation(method, settings, self.spec, index)
        if mitigation.needs_level:
            mitigation.bound(self.calibration.levels)
            self.calibration.check({"model": self.args.model, "num_images": self.noises})
        return Row(name, line or method, mitigation)

    @contextmanager
    def compared(self, rows: Sequence[Row]) -> Iterator[Comparison]:
        """The comparison in its folder, with plain sampling and ``rows`` made."""
        mitigations = [row.mitigation for row in rows if row.mitigation]
        self.detectors = scoring_detectors(mitigations, self.spec, self.calibration)
        with ResultStore(self.out, self.settings, {}) as store:
            comparison = Comparison(store, self.limits, self._frechet())
            for row in (Row(PLAIN, PLAIN), *rows):
                comparison.fill(row, self.batches(row.mitigation, attack=row.attack))
            yield comparison

    @cached_property
    def reference(self) -> Index | None:
        """For the Frechet distance, where there is something to compare with by CLIP features."""
        folder = self.args.reference or self.spec.reference
        return Index(Path(folder)) if folder and self.judge.clip and self.args.memorized * self.noises >= 2 else None

    def _frechet(self) -> Reference | None:
        index, clip = self.reference, self.judge.clip
        return Reference(index.pictures(index.size or (224, 224)), clip) if index and clip else None

    def batches(
        self,
        mitigation: Mitigation | None,
        pipe: LocalStableDiffusionPipeline | None = None,
        attack: Attack | None = None,
    ) -> Sequence[Batch]:
        """What makes the pictures of a row.

        Args:
            mitigation: None for plain sampling.
            pipe: another model's, instead of the comparison's.
            attack: on the embeddings that the mitigation gives.
        """
        pipe = pipe or self.subject.pipe
        at_once = max(1, default_batch_size(pipe) // self.noises)
        parts = [tuple(self.items[start : start + at_once]) for start in range(0, len(self.items), at_once)]
        return [Batch(part, partial(self._make, part, mitigation, pipe, attack)) for part in parts]

    def first_case(self) -> Case:
        """Of the first memorized prompt alone."""
        return self._case(tuple(self.items[:1]), self.subject.pipe)

    def _make_case(self, items: tuple[Item, ...], pipe: LocalStableDiffusionPipeline) -> Case:
        cases = Cases(
            pipe, pipe.pure_noise(self.noises, self.args.seed), self.args.steps, self.spec.scale,
            self.args.seed, default_batch_size(pipe), self.detectors, self.calibration.levels,
            self.calibration.holds_for.get("steps", 50),
        )  # fmt: skip
        return cases([item.prompt or "" for item in items])

    def _make(
        self,
        items: tuple[Item, ...],
        mitigation: Mitigation | None,
        pipe: LocalStableDiffusionPipeline,
        attack: Attack | None,
    ) -> list[Made]:
        case, started = self._case(items, pipe), time.perf_counter()
        remedy, training = mitigation(case) if mitigation else Remedy.unchanged(case), [item.image for item in items]
        seconds = round((time.perf_counter() - started) / len(items), 3)
        if attack:
            remedy = attack(case, remedy, training)
        after = side(case, remedy, self.judge, training)
        return [
            Made(pictures, {"new_prompt": prompt, **measured, "iterations": iterations, "seconds": seconds,
                            "seconds_generation": after.seconds})
            for pictures, prompt, measured, iterations in zip(
                after.pictures, remedy.prompts, after.measured, remedy.iterations, strict=True
            )
        ]  # fmt: skip
