"""Noises where they are needed: ``python -m memorization.studies.sequential RUN``

From a run with 8 noises a prompt: AUC and TPR@1%FPR of the sequential mode against the mean number of UNet evaluations
a prompt, beside fixed numbers of noises. Bands are fitted on the validation half at several risks, everything is
measured on the rest.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from memorization.detectors.base import DEFAULT_DETECTORS, DETECTORS
from memorization.errors import InputError
from memorization.evaluation.bands import ROUNDS, fit_bands, noises_needed
from memorization.evaluation.metrics import family_weights, measure, noise_mean, threshold_at
from memorization.evaluation.runs import read_run_record
from memorization.flags import ArgumentParser, Arguments, add_flags, run_script
from memorization.io.figures import save_figure
from memorization.io.files import read_lines, write_atomically
from memorization.io.tables import markdown

RISKS = (0.2, 0.1, 0.05, 0.02, 0.01, 0.0)


def study(rows: pd.DataFrame, detector: str, evaluations: int, fpr: float, resamples: int) -> pd.DataFrame:
    """A row for each fixed number of noises and each risk.

    Args:
        rows: a run's lines, with ``label``, ``family`` and ``split``.
        evaluations: UNet evaluations a prompt and noise.
        fpr: of the threshold that the bands are fitted round.
    """
    noises = np.array(rows[detector].tolist())
    labels, learn = rows["label"].to_numpy(), (rows["split"] == "validation").to_numpy()
    threshold, _ = threshold_at(labels[learn], noises[learn].mean(1), fpr)
    weights = family_weights(rows["family"].to_numpy()[~learn], labels[~learn], resamples)
    found = []

    def add(mode: str, scores: list[float], used: float) -> None:
        metrics = measure(labels[~learn], np.array(scores), weights).values
        found.append({"mode": mode, "noises": used, "UNet": used * evaluations,
                      **{f"{key} {part}": value for key in ("auc", "tpr@1%")
                         for part, value in zip(("value", "low", "high"), metrics[key], strict=True)}})  # fmt: skip

    for n in ROUNDS:
        add(f"fixed n = {n}", [noise_mean(row, n) for row in noises[~learn]], n)
    for risk in RISKS:
        bands = fit_bands(noises[learn], threshold, risk)
        used = [noises_needed(row, bands) for row in noises[~learn]]
        scores = [noise_mean(row, n) for row, n in zip(noises[~learn], used, strict=True)]
        add(f"sequential, risk {risk:g}", scores, float(np.mean(used)))
    return pd.DataFrame(found)


def draw(table: pd.DataFrame, path: Path, title: str) -> None:
    """AUC and TPR@1%FPR against UNet evaluations a prompt."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.8))
    for axis, key, name in zip(axes, ("auc", "tpr@1%"), ("AUC", "TPR@1%FPR"), strict=True):
        for mode, group in table.groupby(table["mode"].str.split().str[0]):
            axis.plot(group["UNet"], group[f"{key} value"], "o-", label=str(mode).rstrip(","))
        axis.set(xlabel="UNet evaluations a prompt (log)", ylabel=name, xscale="log")
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.suptitle(title)
    save_figure(figure, path)


def main(arguments: Arguments = None) -> None:
    parser = ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("run", type=Path, help="a run made with --noises 8 on a list with validation and test rows")
    add("--detector", default=DEFAULT_DETECTORS[0], help="default: %(default)s")
    add_flags(parser, "--fpr", "--resamples")
    args = parser.parse_args(arguments)
    settings = read_run_record(args.run)["settings"]
    if settings.get("num_images") != ROUNDS[-1] or settings.get("sequential"):
        raise InputError(f"{args.run}: needs a run with a fixed --noises {ROUNDS[-1]}")
    rows = pd.DataFrame(read_lines(args.run / "scores.jsonl")[0])
    if not {"label", "split", args.detector} <= set(rows):
        raise InputError(f"{args.run}: needs labels, a column 'split' and scores by {args.detector}")
    steps = getattr(DETECTORS.get(args.detector), "steps", None)
    if steps is None:
        raise InputError(f"{args.detector}: the study is of detectors that need a prompt alone")
    try:
        table = study(rows, args.detector, len(steps), args.fpr, args.resamples)
    except ValueError as error:
        raise InputError(f"{args.run}: {error}") from None
    print(markdown(table.round(3)))
    write_atomically(args.run / "sequential.csv", table.round(4).to_csv(index=False))
    draw(table, args.run / "sequential.png", f"{settings['model']}: {args.detector}")
    print(f"{args.run}/sequential.csv, sequential.png")


if __name__ == "__main__":
    run_script(main)
