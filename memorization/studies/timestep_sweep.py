"""Which feature separates at which noise level: ``python -m memorization.studies.timestep_sweep --model testbed-eps``

AUC and TPR@1%FPR of every feature of memorization/detectors/features.py against the timestep, on pure noise (the same
noise at every timestep, as one-step detectors see it) and on the latents of a guided generation. The anisotropy paper
says: norms separate at high noise and angles at low noise. A killed study goes on where it stopped.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from torch import Tensor

from memorization.detectors.base import GenerationDetector, PromptDetector
from memorization.detectors.features import FEATURES, features
from memorization.evaluation.metrics import noise_mean, parts_by, roc, tpr_at_fpr
from memorization.flags import ArgumentParser, Arguments, add_flags, run_script, value
from memorization.io.figures import save_figure
from memorization.io.files import write_atomically
from memorization.launch import shared
from memorization.settings import Count
from memorization.studies.labelled import Subject, add_arguments, open_subject, scored


@dataclass(frozen=True)
class NoiseSweep(PromptDetector):
    """Every feature at every place of the grid, on pure noise: ``noise/<feature>@<place>``."""

    steps: tuple[int, ...]

    name: ClassVar[str] = "noise_sweep"

    def __call__(self, trace) -> dict[str, Tensor]:
        found = [features(point) for point in trace]
        return {
            f"noise/{f}@{place}": values[f] for place, values in zip(self.steps, found, strict=True) for f in FEATURES
        }


@dataclass(frozen=True)
class GenerationSweep(GenerationDetector):
    """The same on the latents of a generation: ``generation/<feature>@<place>``."""

    steps: tuple[int, ...]

    name: ClassVar[str] = "generation_sweep"

    def reduce(self, step, predict) -> Tensor:
        found = features(step.prediction)
        return torch.stack([found[f] for f in FEATURES], dim=1)

    def __call__(self, kept: Tensor) -> dict[str, Tensor]:
        return {f"generation/{f}@{place}": kept[place, :, i] for place in self.steps for i, f in enumerate(FEATURES)}


def sweep_table(rows: list[dict], timesteps: dict[int, int], by: str | None = None) -> pd.DataFrame:
    """AUC and TPR@1%FPR by positives, latents, feature and timestep, from the lines of a store.

    Args:
        timesteps: place -> t.
        by: a column; the memorized prompts of each of its values are measured too, against all that are not.
    """
    labels = np.array([row["label"] for row in rows])
    parts: dict[object, np.ndarray] = {"all": np.ones(len(rows), bool)}
    if by:
        parts |= dict(parts_by([row[by] for row in rows], labels))
    found = []
    for key in (key for key in rows[0] if "@" in key):
        latents, rest = key.split("/")
        feature, place = rest.split("@")
        scores = np.array([noise_mean(row[key]) for row in rows])
        for positives, kept in parts.items():
            fpr, tpr = roc(labels[kept], scores[kept])
            found.append({
                "positives": positives, "latents": latents, "feature": feature, "t": timesteps[int(place)],
                "auc": float(np.trapezoid(tpr, fpr)), "tpr@1%": tpr_at_fpr(labels[kept], scores[kept], 0.01)[0],
            })  # fmt: skip
    return pd.DataFrame(found)


def draw(table: pd.DataFrame, path: Path, title: str) -> None:
    """AUC above, TPR@1%FPR below; pure noise on the left, a generation's latents on the right."""
    table = table[table["positives"] == "all"]
    kinds = [kind for kind in ("noise", "generation") if (table["latents"] == kind).any()]
    names = {"noise": "pure noise", "generation": "latents of a generation"}
    figure, axes = plt.subplots(
        2, len(kinds), figsize=(5.4 * len(kinds), 6.4), sharex=True, sharey="row", squeeze=False
    )
    for column, kind in enumerate(kinds):
        for axis, key, label in zip(axes[:, column], ("auc", "tpr@1%"), ("AUC", "TPR@1%FPR"), strict=True):
            for feature, group in table[table["latents"] == kind].groupby("feature", sort=False):
                group = group.sort_values("t")
                axis.plot(group["t"], group[key], "o-", markersize=3, label=feature)
            axis.set(ylabel=label)
            axis.grid(alpha=0.3)
        axes[0, column].axhline(0.5, color="grey", linewidth=0.8)
        axes[0, column].set_title(names[kind])
        axes[1, column].set_xlabel("timestep t (noise to the right)")
    axes[0, 0].legend(fontsize=8)
    figure.suptitle(title)
    save_figure(figure, path)


def sweep(args, subject: Subject) -> tuple[list[dict], dict[int, int]]:
    """The lines of the store, and place -> timestep."""
    grid = subject.pipe.detection_timesteps()
    places = tuple(sorted({*range(0, len(grid), args.every), len(grid) - 3, len(grid) - 1}))
    detectors = [NoiseSweep(places)] + ([] if args.no_generation else [GenerationSweep(places)])
    settings = {"places": list(places), "generation": not args.no_generation, "num_images": args.noises}
    rows = scored(subject, detectors, subject.frame, settings, noises=args.noises, steps=len(grid))
    return rows, {place: grid[place] for place in places}


@shared
def main(arguments: Arguments = None) -> None:
    parser = ArgumentParser(description=__doc__)
    add_arguments(parser)
    add = parser.add_argument
    add_flags(parser, "--noises", default=1)
    add(
        "--every",
        type=value(Count),
        default=5,
        help="steps of the 50-step grid between two (default: %(default)s)",
    )
    add(
        "--by", metavar="COLUMN", help="a table more for the memorized prompts of each value of this column (kind, ...)"
    )
    add("--no-generation", action="store_true", help="pure noise alone: several times cheaper")
    args = parser.parse_args(arguments)
    if args.every < 1:
        parser.error("--every is at least 1")
    subject = open_subject(args, "timestep_sweep")
    if args.by and args.by not in subject.frame:
        parser.error(f"--by: the list has no column {args.by!r}; it has: {', '.join(subject.frame)}")
    rows, timesteps = sweep(args, subject)
    table = sweep_table(rows, timesteps, args.by)
    shown = table.pivot_table(index=["positives", "latents", "feature"], columns="t", values="auc", sort=False)
    print(f"AUC, {len(rows)} prompts\n{shown.round(3).to_string()}")
    write_atomically(subject.out / "table.csv", table.round(4).to_csv(index=False))
    draw(table, subject.out / "sweep.png", f"{subject.spec.name}, {args.split} rows, n = {args.noises}")
    print(f"{subject.out}/table.csv, sweep.png")


if __name__ == "__main__":
    run_script(main)
