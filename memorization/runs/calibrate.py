"""Weights, thresholds and levels of a run's detectors, from its validation rows."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from memorization.detectors.base import DETECTORS
from memorization.errors import InputError
from memorization.evaluation.bands import ROUNDS, fit_bands
from memorization.evaluation.calibration import levels_of
from memorization.evaluation.metrics import fit_weights, threshold_at
from memorization.evaluation.runs import Run


def calibrate(run: Run, target: float) -> dict:
    """What a calibration file holds, from the validation rows (from all rows where the list has no splits).

    Args:
        target: false positive rate of the thresholds.

    Raises:
        InputError: the run is sequential, or the rows have one class only.
    """
    rows = run.without_split("test")
    labels = rows["label"].to_numpy()
    if run.settings.get("sequential"):
        raise InputError(f"{run.name}: a sequential run cannot calibrate; use one with a fixed --noises")
    if set(labels) != {0, 1}:
        raise InputError(f"{run.name}: the calibration rows have one class only; both are needed")
    detectors = {}
    for name, settings in run.settings["detectors"].items():
        if name not in run.names:  # a detector that keeps curves alone
            continue
        scores, entry = np.array(rows[name].tolist()), {}  # (prompts, noises)
        if weighed := _weighed(name):
            terms = np.stack([np.array(rows[term].tolist()) for term in weighed.values()], axis=-1)
            weights = [float(f"{w:.4g}") for w in fit_weights(labels, terms.mean(1))]
            scores = terms @ weights
            kept = {key: value for key, value in settings.items() if key != "terms"}
            entry["settings"] = {**kept, **dict(zip(weighed, weights, strict=True))}
        threshold, realised = threshold_at(labels, scores.mean(1), target)
        if run.noises == ROUNDS[-1] and (scores.mean(1) >= threshold).any():
            entry["bands"] = {n: list(band) for n, band in fit_bands(scores, threshold).items()}
        levels = levels_of(scores.mean(1)[labels == 0])
        detectors[name] = {**entry, "threshold": threshold, "realised_fpr": realised, "levels": levels}
    revision = run.settings.get("revision")
    return {
        "model": run.settings["model"],
        **({"revision": revision} if isinstance(revision, dict) else {}),  # runs of old have one sha256
        "run": Path(run.name).name, "num_images": run.noises,
        "steps": run.settings["steps"], "target_fpr": target,
        "negatives": int((labels == 0).sum()), "positives": int(labels.sum()), "detectors": detectors,
    }  # fmt: skip


def _weighed(name: str) -> dict[str, str]:
    """Setting -> term of the weights that can be fitted; none of a detector that is not at hand any more."""
    return dict(DETECTORS[name].weights) if name in DETECTORS else {}
