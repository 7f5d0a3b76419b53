"""Which two features of one trace separate best together: ``python -m memorization.studies.fusion SWEEP``

From a run of timestep_sweep on the validation half: for every pair of features on pure noise, at any two timesteps (the
cost of the anisotropy score), a logistic regression scored out of fold, with families kept together. The best pair is
what memorization/detectors/fused.py holds; being the best of thousands, its figure here flatters it.
"""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.model_selection import GroupKFold
from tqdm import tqdm

from memorization.errors import InputError
from memorization.evaluation.learned import learned_combination
from memorization.evaluation.metrics import fit_weights, noise_mean, roc, tpr_at_fpr
from memorization.flags import ArgumentParser, Arguments, run_script
from memorization.io.files import read_lines, write_atomically

FOLDS = 5


def out_of_fold(values: np.ndarray, labels: np.ndarray, families: np.ndarray) -> np.ndarray:
    """Log-odds ``(rows,)`` of ``values (rows, k)``, each learned from the other families."""
    scores = np.empty(len(labels))
    for learn, rest in GroupKFold(FOLDS).split(values, labels, families):
        mask = np.zeros(len(labels), dtype=bool)
        mask[learn] = True
        scores[rest] = learned_combination(values, labels, mask)[rest]
    return scores


def pairs(rows: list[dict]) -> pd.DataFrame:
    """Every pair of pure-noise features, best first: out-of-fold AUC and TPR@1%FPR, and the weights fitted on all rows.

    Args:
        rows: lines of a timestep sweep, with ``label`` and ``family``.
    """
    labels, families = np.array([row["label"] for row in rows]), np.array([row["family"] for row in rows])
    keys = [key for key in rows[0] if key.startswith("noise/")]
    columns = {key.removeprefix("noise/"): np.array([noise_mean(row[key]) for row in rows]) for key in keys}
    found = []
    for first, second in tqdm(list(combinations(columns, 2)), desc="pairs"):
        values = np.stack([columns[first], columns[second]], axis=1)
        scores = out_of_fold(values, labels, families)
        fpr, tpr = roc(labels, scores)
        weights = fit_weights(labels, values)
        found.append({
            "first": first, "second": second, "auc": np.trapezoid(tpr, fpr),
            "tpr@1%": tpr_at_fpr(labels, scores, 0.01)[0], "first weight": weights[0], "second weight": weights[1],
        })  # fmt: skip
    return pd.DataFrame(found).sort_values("auc", ascending=False, ignore_index=True)


def main(arguments: Arguments = None) -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("sweep", type=Path, help="folder of a timestep sweep, such as .../testbed-eps-validation")
    args = parser.parse_args(arguments)
    if not (args.sweep / "scores.jsonl").is_file():
        raise InputError(
            f"{args.sweep}: holds no scores.jsonl; python -m memorization.studies.timestep_sweep makes one"
        )
    rows, _ = read_lines(args.sweep / "scores.jsonl")
    if not rows or "family" not in rows[0] or not any(key.startswith("noise/") for key in rows[0]):
        raise InputError(f"{args.sweep}: no timestep sweep on a list with families")
    table = pairs(rows)
    print(table.head(10).round(3).to_string(index=False))
    write_atomically(args.sweep / "fusion.csv", table.round(4).to_csv(index=False))
    print(f"{args.sweep}/fusion.csv; feature@place in the DDIM grid of 50 steps, 0 the noisiest")


if __name__ == "__main__":
    run_script(main)
