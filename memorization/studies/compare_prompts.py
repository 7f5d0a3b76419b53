"""Comparing mitigations on the prompts of a labelled list: memorized and ordinary ones, all from the same noises."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path

import pandas as pd
import torch

from local_sd_pipeline import LocalStableDiffusionPipeline
from memorization.detectors.registry import make_detectors
from memorization.errors import InputError
from memorization.evaluation.calibration import Calibration, read_calibration
from memorization.flags import ArgumentParser
from memorization.index.build import own_index
from memorization.index.store import Index
from memorization.io.prompts import picture_files, read_prompts
from memorization.mitigations.base import Mitigation
from memorization.mitigations.case import Case, Remedy
from memorization.mitigations.registry import MITIGATIONS, make_mitigation
from memorization.paths import ROOT
from memorization.runs.memory import default_batch_size
from memorization.runs.mitigate import side
from memorization.runs.store import ResultStore
from memorization.similarity.frechet import Reference
from memorization.similarity.judge import Measure, make_judge
from memorization.studies.compare import PLAIN, Batch, Comparison, Item, Made, Row
from memorization.studies.compare_report import copy_limits
from memorization.studies.labelled import add_arguments, open_subject


def add_comparison_arguments(parser: ArgumentParser, *, memorized: int) -> None:
    """Flags of every comparison on prompts; ``memorized``: the default of its flag."""
    add_arguments(parser)
    parser.set_defaults(split="test")
    add = parser.add_argument
    add("--memorized", type=int, default=memorized, metavar="N", help="memorized prompts (default: %(default)s)")
    add("--ordinary", type=int, default=8, metavar="N", help="prompts that are not (default: %(default)s)")
    add("--images", type=int, metavar="N", help="noises a prompt (default: the calibration's, else 4)")
    add("--steps", type=int, default=15, help="of a generation (default: %(default)s)")
    add("--index", type=Path, metavar="DIR", help="of training pictures, for methods that need one (default: of those "
        "in the model's list)")  # fmt: skip
    add("--reference", type=Path, metavar="INDEX", help="pixels of pictures as they should look, for the Frechet "
        "distance (default: the model's config)")  # fmt: skip
    add("--resamples", type=int, default=1000, help="bootstrap resamples (default: %(default)s)")


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
        if min(args.memorized, args.ordinary, args.resamples) < 1 or not 3 <= args.steps <= 500:
            raise InputError("--memorized, --ordinary and --resamples are at least 1, --steps from 3 to 500")
        self.args, self.subject = args, open_subject(args, study, pictures=True)
        self.spec = self.subject.spec
        listed = args.prompts or ROOT / self.spec.prompts["prompts"]
        frame = self.subject.frame.assign(picture=picture_files(self.subject.frame, listed))
        self.frame = chosen_prompts(frame, args.memorized, args.ordinary)
        if not 0 < (self.frame["label"] == 1).sum() < len(self.frame):
            raise InputError(f"{listed}: no memorized prompt with a training picture, or no other prompt, was chosen")
        known = [picture for picture in picture_files(read_prompts(listed), listed) if picture]
        self.judge = make_judge(self.subject.pipe, known, self.spec.clip, others=measures)
        self.calibration = read_calibration(ROOT / self.spec.calibration) if self.spec.calibration else Calibration()
        self.images = args.images or self.calibration.holds_for.get("num_images", 4)
        self._case = cache(self._make_case)  # what it holds of the detectors serves every row
        families = self.frame["family"] if "family" in self.frame else self.frame["prompt"]
        self.items = [Item(*values) for values in zip(self.frame["prompt"], self.frame["label"].tolist(), families,
                                                      self.frame["picture"], strict=True)]  # fmt: skip

    @property
    def out(self) -> Path:
        """The comparison's folder."""
        return self.subject.out

    @property
    def title(self) -> str:
        """Of the trade-off curve."""
        memorized = sum(item.label for item in self.items)
        return f"{self.spec.name}: {memorized} memorized prompts, {self.images} noises each"

    @property
    def settings(self) -> dict:
        """Everything that all rows depend on, for the run's settings."""
        return {
            **self.subject.settings,
            **{name: vars(self.args)[name] for name in ("memorized", "ordinary", "steps")},
            "num_images": self.images, "guidance_scale": self.spec.guidance_scale, "levels": self.calibration.levels,
            "judge": self.judge.description,
        }  # fmt: skip

    @contextmanager
    def opened(self) -> Iterator[Comparison]:
        """The comparison in its folder, with plain sampling made."""
        with ResultStore(self.out, self.settings, {}) as store:
            store.record["copy_limits"] = copy_limits(self.spec.copy_limits)
            comparison = Comparison(store, self._reference())
            comparison.fill(Row(PLAIN, PLAIN), self.batches(None))
            yield comparison

    def _reference(self) -> Reference | None:
        """Of the Frechet distance, where there is something to compare with by CLIP features."""
        folder, clip = self.args.reference or self.spec.reference, self.judge.clip
        if not (folder and clip) or self.args.memorized * self.images < 2:
            return None
        index = Index(ROOT / folder)
        return Reference(index.pictures(index.size or (224, 224)), clip)

    def mitigation(self, method: str, settings: Mapping | None = None) -> Mitigation:
        """A method with the model's own settings for it, ``settings`` on top, and an index where it needs one.

        Raises:
            InputError: there is no such method or setting, or it needs a calibration that holds for other noises.
        """
        own = dict(self.spec.amg) if method == "amg" else {}
        if getattr(MITIGATIONS.get(method), "needs_index", False):
            own["index"] = str(self.args.index or own_index(self.spec))
        mitigation = make_mitigation(method, {**own, **(settings or {})})
        if getattr(mitigation, "lowers", None) and mitigation.target is None:
            self.calibration.check({"num_images": self.images})
        return mitigation

    def batches(
        self, mitigation: Mitigation | None, pipe: LocalStableDiffusionPipeline | None = None
    ) -> Sequence[Batch]:
        """What makes the pictures of a row.

        Args:
            mitigation: None for plain sampling.
            pipe: another model's, instead of the comparison's.
        """
        pipe = pipe or self.subject.pipe
        at_once = max(1, default_batch_size(pipe) // self.images)
        parts = [tuple(self.items[start : start + at_once]) for start in range(0, len(self.items), at_once)]
        return [Batch(part, partial(self._make, part, mitigation, pipe)) for part in parts]

    def first_case(self) -> Case:
        """Of the first memorized prompt alone."""
        return self._case((self.items[0],), self.subject.pipe)

    def _make_case(self, items: tuple[Item, ...], pipe: LocalStableDiffusionPipeline) -> Case:
        anisotropy = {**self.spec.anisotropy, **self.calibration.anisotropy}
        detectors = make_detectors(["anisotropy", "noise_norm"], {"anisotropy": anisotropy})
        prompts = [item.prompt for item in items]
        with torch.no_grad():
            embeds = pipe.embed(prompts).float()
        return Case(
            pipe, prompts, embeds, pipe.pure_noise(self.images, self.args.seed), {d.name: d for d in detectors},
            self.calibration.levels, self.args.steps, self.calibration.holds_for.get("steps", 50),
            self.spec.guidance_scale, self.args.seed, default_batch_size(pipe),
        )  # fmt: skip

    def _make(
        self, items: tuple[Item, ...], mitigation: Mitigation | None, pipe: LocalStableDiffusionPipeline
    ) -> list[Made]:
        case, started = self._case(items, pipe), time.perf_counter()
        remedy = mitigation(case) if mitigation else Remedy.unchanged(case)
        seconds = round((time.perf_counter() - started) / len(items), 3)
        after = side(case, remedy, self.judge, [item.image for item in items])
        return [
            Made(pictures, {"new_prompt": prompt, **measured, "iterations": iterations, "seconds": seconds,
                            "seconds_generation": after.seconds})
            for pictures, prompt, measured, iterations in zip(
                after.pictures, remedy.prompts, after.measured, remedy.iterations, strict=True
            )
        ]  # fmt: skip
