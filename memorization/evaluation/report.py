"""Every number of a run's table, the table for people, and its pictures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from memorization.errors import InputError
from memorization.evaluation import plots, text_baselines
from memorization.evaluation.metrics import Metrics, family_weights, measure, paired_difference, parts_by
from memorization.evaluation.runs import Run

REFERENCE = "noise_norm"  # detectors are compared with it in pairs
SUMMED = ("norm", "cosine")  # the terms that --weights sums


def evaluate(
    run: Run, resamples: int = 2000, sum_weights: tuple[float, float] | None = None, by: str | None = None
) -> dict:
    """Every number of a run's table, as it goes into ``metrics.json``.

    Args:
        resamples: of the bootstrap over families.
        sum_weights: of the norm and the cosine, for one more row.
        by: a column; the memorized prompts of each of its values are also measured alone, against all that are not.

    Raises:
        InputError: the list has no column ``by``.
    """
    labels, families = run.scored["label"].to_numpy(), run.scored["family"].astype(str).to_numpy()
    scores = _scores(run, sum_weights)
    result = {
        "run": Path(run.name).name,
        "model": run.settings["model"],
        "counts": {
            "memorized": int(labels.sum()), "not_memorized": int((1 - labels).sum()),
            "families": len(set(families)), "families_memorized": len(set(families[labels == 1])),
            "left_out_validation": len(run.rows) - len(run.scored), "resamples": resamples,
        },
        **_compared(scores, labels, families, resamples),
        "costs": _costs(run),
    }  # fmt: skip
    if by:
        if by not in _columns(run):
            raise InputError(f"{run.name}: its rows have no column {by!r}; they have: {', '.join(_columns(run))}")
        result["by"] = {"column": by, "parts": []}
        for value, kept in parts_by(run.scored[by].tolist(), labels):
            part = {key: of[kept] for key, of in scores.items()}
            result["by"]["parts"].append({
                "value": value, "memorized": int(labels[kept].sum()),
                **_compared(part, labels[kept], families[kept], resamples),
            })  # fmt: skip
    return result


def _columns(run: Run) -> list[str]:
    """Columns that are no scores."""
    return [column for column in run.scored if not isinstance(run.scored[column].iloc[0], list)]


def _scores(run: Run, sum_weights: tuple[float, float] | None) -> dict[tuple[str, int | None], np.ndarray]:
    """Name and number of noises -> scores of the scored rows."""
    counts = sorted({1, run.noises})
    scores = {(name, n): run.scores(run.scored, name, n) for n in counts for name in run.names}
    scores |= {(name, n): values for n in counts for name, values in run.fitted(n).items()}
    if sum_weights and set(SUMMED) <= set(run.names):
        title = " + ".join(f"{name} x {weight:g}" for name, weight in zip(SUMMED, sum_weights, strict=True))
        for n in counts:
            scores[title, n] = np.dot(sum_weights, [run.scores(run.scored, name, n) for name in SUMMED])
    return scores | {(name, None): values for name, values in _text_scores(run).items()}


def _compared(
    scores: dict[tuple[str, int | None], np.ndarray], labels: np.ndarray, families: np.ndarray, resamples: int
) -> dict[str, list[dict]]:
    """Every score's metrics, and their differences to the reference, on the same resamples."""
    weights = family_weights(families, labels, resamples)
    measured = {key: measure(labels, values, weights) for key, values in scores.items()}
    detectors = [
        {"detector": name, "images": n, **{key: dict(zip(("value", "low", "high"), value, strict=True))
         for key, value in metrics.values.items()}, "realised_fpr": metrics.realised_fpr}
        for (name, n), metrics in measured.items()
    ]  # fmt: skip
    return {"detectors": detectors, "paired": _paired(measured)}


def _costs(run: Run) -> dict[str, dict]:
    """What ``--measure-costs`` wrote, by the name of every score; a term costs what its detector does."""
    terms = {term: name for name, settings in run.settings["detectors"].items() for term in settings["terms"]}
    return {**{term: run.costs[name] for term, name in terms.items() if name in run.costs}, **run.costs}


def _paired(measured: dict[tuple[str, int | None], Metrics]) -> list[dict]:
    """Every detector against the reference at the same number of noises; scores that rank alike are left out."""
    rows = []
    for (name, noises), metrics in measured.items():
        reference = measured.get((REFERENCE, noises))
        for key in ("auc", "tpr@1%"):
            if reference and (metrics.resampled[key] != reference.resampled[key]).any():
                difference = paired_difference(metrics, reference, key)
                rows.append({"detector": name, "against": REFERENCE, "images": noises, "metric": key, **difference})
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


def numbers(metrics: dict) -> pd.DataFrame:
    """The scores of :func:`evaluate` as numbers, a row each: ``auc``, ``auc low``, ``auc high``, and so on."""
    return pd.DataFrame([
        {"detector": row["detector"], "noises": row["images"],
         **{f"{key} {part}".removesuffix(" value"): row[key][part]
            for key in ("auc", "tpr@1%", "tpr@3%") for part in ("value", "low", "high")}}
        for row in metrics["detectors"]
    ])  # fmt: skip


def table(metrics: dict) -> pd.DataFrame:
    """The table of one run, numbers as text."""
    rows = []
    for row in metrics["detectors"]:
        rows.append({
            "detector": row["detector"], **_cost_cells(row, metrics["costs"]), "n": row["images"] or "-",
            "AUC": _interval(row["auc"]),
            **{f"TPR@{t}%FPR": f"{_interval(row[key])} at {row['realised_fpr'][key]:.2%}"
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


def by_table(metrics: dict) -> pd.DataFrame:
    """The memorized prompts of each value of a column, a row a value and detector."""
    rows = []
    for part in metrics["by"]["parts"]:
        less = {(line["detector"], line["images"]): line for line in part["paired"] if line["metric"] == "auc"}
        for row in part["detectors"]:
            line = less.get((row["detector"], row["images"]))
            rows.append({
                metrics["by"]["column"]: part["value"], "memorized": part["memorized"], "detector": row["detector"],
                "n": row["images"] or "-", "AUC": _interval(row["auc"]), "TPR@1%FPR": _interval(row["tpr@1%"]),
                f"AUC less {REFERENCE}'s": f"{line['difference']:+.3f} [{line['low']:+.3f}, {line['high']:+.3f}]"
                if line else "-",
            })  # fmt: skip
    return pd.DataFrame(rows)


def _interval(cell: dict) -> str:
    return f"{cell['value']:.3f} [{cell['low']:.3f}, {cell['high']:.3f}]"


def paired_table(metrics: dict) -> pd.DataFrame:
    """Differences to the reference detector, a row a detector."""
    return pd.DataFrame([
        {"detector": row["detector"], "n": row["images"], "metric": row["metric"].upper(),
         "difference": f"{row['difference']:+.3f} [{row['low']:+.3f}, {row['high']:+.3f}]", "p": f"{row['p']:.3f}"}
        for row in metrics["paired"]
    ])  # fmt: skip


def draw(run: Run, folder: Path) -> None:
    """The run's pictures, into ``folder``."""
    labels = run.scored["label"].to_numpy()
    scores = {name: run.scores(run.scored, name, run.noises) for name in run.names}
    if not scores:
        return
    title = f"{run.settings['model']}, n = {run.noises}"
    plots.draw_roc(labels, scores, folder / "roc.png", title)
    plots.draw_distributions(labels, scores, folder / "distributions.png", title)
    if set(SUMMED) <= set(scores):
        plots.draw_terms(labels, *(scores[name] for name in SUMMED), folder / "norm_cosine.png", title)
    if {"kind", "duplicates", "replication"} <= set(run.rows):
        first = run.names[0]
        plots.draw_duplicates(run.scored, scores[first], first, folder / "duplicates.png", title)
