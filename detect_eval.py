#!/usr/bin/env python
"""Evaluate scored runs: metrics table with 95% intervals, metrics.json and pictures in each run's folder.

  python detect_eval.py                                 every run under results/
  python detect_eval.py results/detection/testbed-eps/main --format csv
  python detect_eval.py results/detection/testbed-eps/main --calibrate mine.yaml --fpr 0.01

Where a list has a column "split", its rows "validation" are for --calibrate alone; the table is of the others.
TPR@1% is the largest TPR with FPR <= 1%; the FPR realised there and the number of negatives stand beside it. Intervals
resample whole families of near-copies.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import yaml

from memorization.errors import InputError
from memorization.evaluation import text_baselines
from memorization.evaluation.bands import ROUNDS, fit_bands
from memorization.evaluation.learned import learned_combination, z_score_size
from memorization.evaluation.metrics import (
    Metrics,
    family_weights,
    fit_weights,
    measure,
    noise_mean,
    paired_difference,
    threshold_at,
)
from memorization.flags import ArgumentParser, run_script
from memorization.io.files import read_json, read_lines, write_atomically
from memorization.io.tables import markdown

ROOT = Path(__file__).resolve().parent
REFERENCE = "noise_norm"  # detectors are compared with it in pairs
LEVELS = (0.25, 0.5, 0.75, 0.9, 0.99)  # shares of the prompts that are not memorized; mitigations aim at them
ONE_TRACE = ("norm", "cosine", "one_step")  # what the learned combination is made of: a single trace's scores


class Run:
    """A run's folder: its rows, all of them and the scored ones, and the names of its scores.

    Raises:
        InputError: the folder holds no run, or one without labels or with one class only.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if not (folder / "run.json").is_file():
            raise InputError(f"{folder}: holds no run (no run.json); detect_mem.py makes one")
        record = read_json(folder / "run.json")
        self.settings = record["settings"]
        if "detectors" not in self.settings:
            raise InputError(f"{folder}: a study's folder, not a run of detect_mem.py")
        if record["status"] != "complete":
            print(f"{folder}: this run is not complete; the table is of what there is", file=sys.stderr)
        rows, _ = read_lines(folder / "scores.jsonl")
        self.rows = pd.DataFrame(rows)
        if self.rows.empty or "label" not in self.rows:
            raise InputError(f"{folder}: its prompts have no labels, so there is nothing to evaluate")
        self.scored = self.without_split("validation")
        if set(self.scored["label"]) != {0, 1}:
            raise InputError(f"{folder}: the scored rows have one class only; both are needed")
        if (families := self.scored["family"].nunique()) < 10:
            print(f"{folder}: {families} families of near-copies only; the intervals mean little", file=sys.stderr)
        self.names = list(dict.fromkeys(term for d in self.settings["detectors"].values() for term in d["terms"]))

    def without_split(self, name: str) -> pd.DataFrame:
        """Rows that are not of split ``name``; all rows where the list has no splits."""
        return self.rows[self.rows["split"] != name] if "split" in self.rows else self.rows

    def fitted(self, images: int) -> dict[str, np.ndarray]:
        """Scores of the scored rows that were learned from the validation rows; none where the list has no splits."""
        if "split" not in self.rows or self.without_split("test")["label"].nunique() < 2:
            return {}
        labels, learn = self.rows["label"].to_numpy(), (self.rows["split"] == "validation").to_numpy()
        scored, found = self.rows.index.isin(self.scored.index), {}
        for detector, settings in self.settings["detectors"].items():
            if curves := settings.get("curves"):
                values = np.concatenate([self._curves(name, images) for name in curves], axis=1)
                found[detector] = z_score_size(values, learn & (labels == 0))[scored]
        if len(terms := [name for name in ONE_TRACE if name in self.rows]) > len(ONE_TRACE) / 2:
            values = np.stack([self.scores(self.rows, name, images) for name in terms], axis=1)
            found["learned: one trace"] = learned_combination(values, labels, learn)[scored]
        return found

    def _curves(self, name: str, images: int) -> np.ndarray:
        """Curves ``(rows, k)``, mean over the first ``images`` noises."""
        return np.array([np.mean(curves[:images], axis=0) for curves in self.rows[name]])

    def scores(self, rows: pd.DataFrame, name: str, images: int) -> np.ndarray:
        """Scores of ``rows`` by the mean over the first ``images`` noises."""
        return np.array([noise_mean(values, images) for values in rows[name]])


def evaluate(run: Run, resamples: int, sum_weights: tuple[float, float] | None = None) -> dict:
    """Every number of a run's table, as it goes into ``metrics.json``.

    Args:
        sum_weights: of the norm and the cosine, for one more row.
    """
    labels, families = run.scored["label"].to_numpy(), run.scored["family"].astype(str).to_numpy()
    weights = family_weights(families, labels, resamples)
    images = sorted({1, run.settings["num_images"]})
    measured: dict[tuple[str, int | None], Metrics] = {
        (name, n): measure(labels, run.scores(run.scored, name, n), weights) for n in images for name in run.names
    }
    measured |= {(name, n): measure(labels, scores, weights) for n in images for name, scores in run.fitted(n).items()}
    if sum_weights and {"norm", "cosine"} <= set(run.names):
        for n in images:
            terms = [run.scores(run.scored, name, n) for name in ("norm", "cosine")]
            measured["norm x {:g} + cosine x {:g}".format(*sum_weights), n] = measure(
                labels, np.dot(sum_weights, terms), weights
            )
    for name, scores in _text_scores(run).items():
        measured[name, None] = measure(labels, scores, weights)
    return {
        "run": run.folder.name,
        "model": run.settings["model"],
        "counts": {
            "memorized": int(labels.sum()), "not_memorized": int((1 - labels).sum()),
            "families": len(set(families)), "families_memorized": len(set(families[labels == 1])),
            "left_out_validation": len(run.rows) - len(run.scored), "resamples": resamples,
        },
        "detectors": [
            {"detector": name, "images": n, **{key: dict(zip(("value", "low", "high"), value, strict=True))
             for key, value in metrics.values.items()}, "realised_fpr": metrics.realised_fpr}
            for (name, n), metrics in measured.items()
        ],
        "paired": _paired(measured),
        "costs": _costs(run),
    }  # fmt: skip


def _costs(run: Run) -> dict[str, dict]:
    """What ``--measure-costs`` wrote, by the name of every score; a term costs what its detector does."""
    path = run.folder / "costs.json"
    costs = read_json(path) if path.exists() else {}
    terms = {term: name for name, settings in run.settings["detectors"].items() for term in settings["terms"]}
    return {**{term: costs[name] for term, name in terms.items() if name in costs}, **costs}


def _paired(measured: dict[tuple[str, int | None], Metrics]) -> list[dict]:
    """Every detector against the reference at the same number of images; scores that rank alike are left out."""
    rows = []
    for (name, images), metrics in measured.items():
        reference = measured.get((REFERENCE, images))
        for key in ("auc", "tpr@1%"):
            if reference and (metrics.resampled[key] != reference.resampled[key]).any():
                difference = paired_difference(metrics, reference, key)
                rows.append({"detector": name, "against": REFERENCE, "images": images, "metric": key, **difference})
    return rows


def _text_scores(run: Run) -> dict[str, np.ndarray]:
    """Text-only baselines on the scored rows; naive Bayes learns out of fold from all rows."""
    prompts, labels = run.rows["prompt"].tolist(), run.rows["label"].to_numpy()
    families = run.rows["family"].astype(str).to_numpy()
    scored = run.rows.index.isin(run.scored.index)
    return {
        "text: capitals": text_baselines.capitals(prompts)[scored],
        "text: naive Bayes": text_baselines.naive_bayes(prompts, labels, families)[scored],
    }


# ---------------------------------------------------------------- output
def table(metrics: dict) -> pd.DataFrame:
    """The table of one run, numbers as text."""

    def interval(cell: dict) -> str:
        return f"{cell['value']:.3f} [{cell['low']:.3f}, {cell['high']:.3f}]"

    rows = []
    for row in metrics["detectors"]:
        rows.append({
            "detector": row["detector"], **_cost_cells(row, metrics["costs"]), "n": row["images"] or "-",
            "AUC": interval(row["auc"]),
            **{f"TPR@{t}%FPR": f"{interval(row[key])} at {row['realised_fpr'][key]:.2%}"
               for t, key in ((1, "tpr@1%"), (3, "tpr@3%"))},
        })  # fmt: skip
    return pd.DataFrame(rows)


def _cost_cells(row: dict, costs: dict) -> dict:
    """What the detector needs, its UNet evaluations and seconds a prompt; nothing where costs were not measured."""
    if not costs:
        return {}
    cost = costs.get(row["detector"])
    if cost is None or row["images"] is None:  # a learned score, a text score: what they are made of pays
        return {"needs": "-", "UNet": "-", "s/prompt": "-"}
    n = row["images"]
    return {"needs": cost["needs"], "UNet": f"{cost['evaluations'] * n:g}", "s/prompt": f"{cost['seconds'] * n:.3g}"}


def print_tables(all_metrics: list[dict], style: str) -> None:
    """Every run's table on standard output, as md, csv or json."""
    if style == "json":
        print(json.dumps(all_metrics, indent=1))
    elif style == "csv":
        frames = [table(metrics).assign(run=metrics["run"]) for metrics in all_metrics]
        pd.concat(frames).to_csv(sys.stdout, index=False)
    else:
        for metrics in all_metrics:
            counts = metrics["counts"]
            print(f"\n### {metrics['run']}: {counts['memorized']} memorized, {counts['not_memorized']} not memorized, "
                  f"{counts['families']} families\n")  # fmt: skip
            print(markdown(table(metrics)))
            if metrics["paired"]:
                print(f"\nAgainst {REFERENCE}, on the same resamples:\n")
                print(markdown(paired_table(metrics)))


def paired_table(metrics: dict) -> pd.DataFrame:
    """Differences to the reference detector, a row a detector."""
    return pd.DataFrame([
        {"detector": row["detector"], "n": row["images"], "metric": row["metric"].upper(),
         "difference": f"{row['difference']:+.3f} [{row['low']:+.3f}, {row['high']:+.3f}]", "p": f"{row['p']:.3f}"}
        for row in metrics["paired"]
    ])  # fmt: skip


def draw(run: Run) -> None:
    """The run's pictures, beside its scores."""
    from memorization.evaluation import plots

    labels, images = run.scored["label"].to_numpy(), run.settings["num_images"]
    scores = {name: run.scores(run.scored, name, images) for name in run.names}
    if not scores:
        return
    title = f"{run.folder.name}, n = {images}"
    plots.draw_roc(labels, scores, run.folder / "roc.png", title)
    plots.draw_distributions(labels, scores, run.folder / "distributions.png", title)
    if "cosine" in scores:
        plots.draw_terms(labels, scores["norm"], scores["cosine"], run.folder / "norm_cosine.png", title)
    if {"kind", "duplicates", "replication"} <= set(run.rows):
        first = run.names[0]
        plots.draw_duplicates(run.scored, scores[first], first, run.folder / "duplicates.png", title)


# ---------------------------------------------------------------- calibration
def calibrate(run: Run, target: float) -> dict:
    """Weights and thresholds from the validation rows (from all rows where the list has no splits)."""
    rows = run.without_split("test")
    labels, images = rows["label"].to_numpy(), run.settings["num_images"]
    if run.settings.get("sequential"):
        raise InputError(f"{run.folder}: a sequential run cannot calibrate; use one with a fixed --num-images")
    if set(labels) != {0, 1}:
        raise InputError(f"{run.folder}: the calibration rows have one class only; both are needed")
    detectors = {}
    for name, settings in run.settings["detectors"].items():
        if name not in run.names:  # a detector that keeps curves alone
            continue
        scores, entry = np.array(rows[name].tolist()), {}  # (prompts, noises)
        if name == "anisotropy":
            terms = np.stack([np.array(rows[term].tolist()) for term in ("norm", "cosine")], axis=-1)
            norm_weight, cosine_weight = (float(f"{w:.4g}") for w in fit_weights(labels, terms.mean(1)))
            scores = terms @ [norm_weight, cosine_weight]
            kept = {key: value for key, value in settings.items() if key != "terms"}
            entry["settings"] = {**kept, "norm_weight": norm_weight, "cosine_weight": cosine_weight}
        threshold, realised = threshold_at(labels, scores.mean(1), target)
        if images == ROUNDS[-1] and (scores.mean(1) >= threshold).any():
            entry["bands"] = {n: list(band) for n, band in fit_bands(scores, threshold).items()}
        levels = {share: float(f"{np.quantile(scores.mean(1)[labels == 0], share):.5g}") for share in LEVELS}
        detectors[name] = {**entry, "threshold": threshold, "realised_fpr": realised, "levels": levels}
    return {
        "model": run.settings["model"], "run": run.folder.name, "num_images": images,
        "steps": run.settings["steps"], "target_fpr": target,
        "negatives": int((labels == 0).sum()), "positives": int(labels.sum()), "detectors": detectors,
    }  # fmt: skip


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("runs", nargs="*", type=Path, metavar="RUN", help="run folders (default: every run under results/)")
    add("--format", choices=["md", "csv", "json"], default="md", help="of the table (default: %(default)s)")
    add("--resamples", type=int, default=2000, metavar="N", help="bootstrap resamples (default: %(default)s)")
    add(
        "--weights",
        nargs=2,
        type=float,
        metavar=("NORM", "COSINE"),
        help="one more row: the sum of the two terms with these weights, as in --weights 1 2",
    )
    add("--no-plots", action="store_true", help="draw no pictures")
    add("--calibrate", type=Path, metavar="FILE", help="write weights and thresholds of the one run given to FILE")
    add("--fpr", type=float, default=0.01, help="false positive rate of the thresholds (default: %(default)s)")
    args = parser.parse_args()
    if not 0 < args.fpr < 1 or args.resamples < 100:
        parser.error("--fpr lies between 0 and 1, --resamples is at least 100")
    found = [path.parent for path in (ROOT / "results").glob("**/run.json") if "studies" not in path.parts]
    folders = args.runs or sorted(found)
    if not folders:
        raise InputError("no run under results/; start with: bash run_detection.sh")
    if args.calibrate:
        if len(folders) != 1:
            parser.error("--calibrate takes one run")
        calibration = calibrate(Run(folders[0]), args.fpr)
        write_atomically(args.calibrate, yaml.safe_dump(calibration, sort_keys=False))
        print(f"{args.calibrate}: from {calibration['negatives']} negatives and {calibration['positives']} positives")
        return
    all_metrics = []
    for folder in folders:
        try:
            run = Run(folder)
        except InputError as error:
            if args.runs:
                raise
            print(f"left out: {error}", file=sys.stderr)
            continue
        metrics = evaluate(run, args.resamples, args.weights)
        write_atomically(folder / "metrics.json", json.dumps(metrics, indent=1) + "\n")
        if not args.no_plots:
            draw(run)
        all_metrics.append(metrics)
    print_tables(all_metrics, args.format)


if __name__ == "__main__":
    run_script(main)
