"""Runs read back: their rows, the scored ones of them, and the names of their scores."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd

from memorization.errors import InputError, printable
from memorization.evaluation.learned import ONE_TRACE, joint_z_score, learned_combination
from memorization.evaluation.metrics import noise_mean
from memorization.io.files import is_file, read_lines
from memorization.io.records import read_costs, read_record
from memorization.settings import Count, Steps, is_finite, value_of


class Run:
    """Scores of a labelled list.

    Args:
        rows: a row a prompt: ``label`` 0 or 1, ``family``, and under each score's name a list with a value a noise.
            Rows of a ``split`` "validation" are for calibration and for learned scores; the others are scored.
        settings: of the run; where none are given, every column of lists of numbers is a detector's score.
        costs: what ``--measure-costs`` wrote.

    Attributes:
        scored: the rows that are evaluated.
        names: of the scores, detectors before their terms.
        noises: a prompt.

    Raises:
        InputError: there are no labels, or of one class only.
    """

    def __init__(
        self, rows: pd.DataFrame, settings: dict | None = None, *, name: str = "scores", costs: dict | None = None
    ) -> None:
        self.rows, self.name, self.costs = rows.reset_index(drop=True), name, costs or {}
        if rows.empty or "label" not in rows:
            raise InputError(f"{name}: its prompts have no labels, so there is nothing to evaluate")
        self.settings = settings or _settings_of(rows)
        self.scored = self.without_split("validation")
        if not all(type(label) is not bool and label in (0, 1) for label in rows["label"].tolist()):
            raise InputError(f"{name}: its column 'label' holds something other than 0 and 1")
        if set(self.scored["label"]) != {0, 1}:
            raise InputError(f"{name}: the scored rows have one class only; both are needed")
        if "family" not in rows:
            raise InputError(f"{name}: its rows have no column 'family'; each near-copy of a prompt belongs to one")
        self.names = score_names(self.settings)
        self.noises: int = self.settings["num_images"]
        self._check_scores()

    def _check_scores(self) -> None:
        """See that every score is a list of finite numbers, a value a noise.

        Raises:
            InputError: one is something else; names the row.
        """
        fewer = bool(self.settings.get("sequential"))  # prompts that are decided early have fewer noises
        for name in self.names:
            if name not in self.rows:
                raise InputError(f"{self.name}: its rows have no {name!r}, which the run's settings name")
            for number, values in enumerate(self.rows[name]):
                count = len(values) if isinstance(values, list) else 0
                if not (count == self.noises or (fewer and 0 < count < self.noises)) or not all(map(_finite, values)):
                    raise InputError(f"{self.name}, row {number}: {name} = {str(values)[:80]} is no list of "
                                     f"{self.noises} numbers")  # fmt: skip

    def without_split(self, name: str) -> pd.DataFrame:
        """Rows that are not of split ``name``; all rows where the list has no splits."""
        return self.rows[self.rows["split"] != name] if "split" in self.rows else self.rows

    def fitted(self, noises: int) -> dict[str, np.ndarray]:
        """Scores of the scored rows that were learned from the validation rows; none where the list has no splits."""
        if "split" not in self.rows or self.without_split("test")["label"].nunique() < 2:
            return {}
        labels, learn = self.rows["label"].to_numpy(), (self.rows["split"] == "validation").to_numpy()
        scored, found = self.rows.index.isin(self.scored.index), {}
        for detector, settings in self.settings["detectors"].items():
            if curves := settings.get("curves"):
                values = [self._curves(name, noises) for name in curves]
                found[detector] = joint_z_score(values, learn & (labels == 0))[scored]
        if len(terms := [name for name in ONE_TRACE if name in self.rows]) > len(ONE_TRACE) / 2:
            values = np.stack([self.scores(self.rows, name, noises) for name in terms], axis=1)
            found["learned: one trace"] = learned_combination(values, labels, learn)[scored]
        return found

    def _curves(self, name: str, noises: int) -> np.ndarray:
        """Curves ``(rows, k)``, mean over the first ``noises``."""
        return np.array([np.mean(curves[:noises], axis=0) for curves in self.rows[name]])

    def scores(self, rows: pd.DataFrame, name: str, noises: int) -> np.ndarray:
        """Scores of ``rows`` by the mean over the first ``noises``, ``(rows,)``."""
        return np.array([noise_mean(values, noises) for values in rows[name]])


def score_names(settings: Mapping) -> list[str]:
    """Of a run's settings, detectors before their terms."""
    return list(dict.fromkeys(term for one in settings["detectors"].values() for term in one["terms"]))


def _finite(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and is_finite(value)


def _settings_of(rows: pd.DataFrame) -> dict:
    first = rows.iloc[0]
    names = [key for key, value in first.items() if isinstance(value, list) and not isinstance((value or [0])[0], list)]
    if not names:
        raise InputError("no column holds scores: a list with a value a noise in every row")
    detectors = {name: {"terms": [name]} for name in names}
    return {"model": "", "num_images": max(len(values) for values in rows[names[0]]), "detectors": detectors}


def read_run(folder: Path) -> Run:
    """A run's folder; what a reader should know of it goes to standard error.

    Raises:
        InputError: the folder holds no run, or one without labels or with one class only.
    """
    record = read_run_record(folder)
    if "detectors" not in record["settings"]:
        raise InputError(f"{folder}: a study's folder, not a run of detect_mem.py")
    _check_settings(record["settings"], folder / "run.json")
    if record["status"] != "complete":
        print(printable(f"{folder}: this run is not complete; the table is of what there is"), file=sys.stderr)
    costs, scores = folder / "costs.json", folder / "scores.jsonl"
    lines, _ = read_lines(scores)
    if record["status"] == "complete" and len(lines) != record.get("lines", len(lines)):
        raise InputError(f"{scores}: holds {len(lines)} lines of the {record['lines']} that run.json says")
    run = Run(pd.DataFrame(lines), record["settings"], name=str(folder),
              costs=read_costs(costs) if os.path.lexists(costs) else None)  # fmt: skip
    if (families := run.scored["family"].nunique()) < 10:
        print(printable(f"{folder}: {families} families of near-copies only; the intervals mean little"),
              file=sys.stderr)  # fmt: skip
    return run


def read_run_record(folder: Path) -> dict:
    """The ``run.json`` of a run's folder.

    Raises:
        InputError: the folder holds no run, or it is damaged.
    """
    if not is_file(folder / "run.json"):
        raise InputError(f"{folder}: holds no run (no run.json); detect_mem.py makes one")
    return read_record(folder / "run.json")


SETTINGS = {"model": str, "num_images": Count, "steps": Steps, "detectors": dict[str, dict]}


def _check_settings(settings: dict, path: Path) -> None:
    for name, kind in SETTINGS.items():
        value_of(kind, settings.get(name), f"{path}: settings: {name}")
    for name, of_detector in settings["detectors"].items():
        value_of(tuple[str, ...], of_detector.get("terms"), f"{path}: settings: {name}: terms")
