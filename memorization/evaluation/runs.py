"""Runs read back: their rows, the scored ones of them, and the names of their scores."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pandas as pd

from memorization.errors import InputError
from memorization.evaluation.learned import ONE_TRACE, learned_combination, z_score_size
from memorization.evaluation.metrics import noise_mean
from memorization.io.files import read_json, read_lines


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
        if set(self.scored["label"]) != {0, 1}:
            raise InputError(f"{name}: the scored rows have one class only; both are needed")
        if "family" not in rows:
            raise InputError(f"{name}: its rows have no column 'family'; each near-copy of a prompt belongs to one")
        self.names = list(dict.fromkeys(term for d in self.settings["detectors"].values() for term in d["terms"]))
        self.noises: int = self.settings["num_images"]

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
                values = np.concatenate([self._curves(name, noises) for name in curves], axis=1)
                found[detector] = z_score_size(values, learn & (labels == 0))[scored]
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


def _settings_of(rows: pd.DataFrame) -> dict:
    first = rows.iloc[0]
    names = [key for key, value in first.items() if isinstance(value, list) and not isinstance(value[0], list)]
    if not names:
        raise InputError("no column holds scores: a list with a value a noise in every row")
    detectors = {name: {"terms": [name]} for name in names}
    return {"model": "", "num_images": max(len(values) for values in rows[names[0]]), "detectors": detectors}


def read_run(folder: Path) -> Run:
    """A run's folder; what a reader should know of it goes to standard error.

    Raises:
        InputError: the folder holds no run, or one without labels or with one class only.
    """
    if not (folder / "run.json").is_file():
        raise InputError(f"{folder}: holds no run (no run.json); detect_mem.py makes one")
    record = read_json(folder / "run.json")
    if "detectors" not in record["settings"]:
        raise InputError(f"{folder}: a study's folder, not a run of detect_mem.py")
    if record["status"] != "complete":
        print(f"{folder}: this run is not complete; the table is of what there is", file=sys.stderr)
    costs = folder / "costs.json"
    rows = pd.DataFrame(read_lines(folder / "scores.jsonl")[0])
    run = Run(rows, record["settings"], name=str(folder), costs=read_json(costs) if costs.exists() else None)
    if (families := run.scored["family"].nunique()) < 10:
        print(f"{folder}: {families} families of near-copies only; the intervals mean little", file=sys.stderr)
    return run
