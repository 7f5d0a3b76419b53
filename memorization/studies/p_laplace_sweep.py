"""p-Laplace detection against p, noise level and number of points: ``python -m memorization.studies.p_laplace_sweep``

On generated pictures of a labelled list's validation rows: AUC with and without the prompt. All p share the scores;
N points are the first N of the largest number. A killed study goes on where it stopped.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor

from memorization.detectors.base import ImageDetector
from memorization.detectors.laplacian import boundary_samples, random_directions
from memorization.flags import ArgumentParser, Arguments, run_script, value
from memorization.io.figures import save_figure
from memorization.io.files import write_atomically
from memorization.launch import shared
from memorization.settings import Count, Timestep
from memorization.studies.labelled import add_arguments, open_subject, scored

POWERS = (0.5, 1.0, 1.5, 2.0, 3.0)
POINTS = (4, 16, 64)


@dataclass(frozen=True)
class PLaplaceSweep(ImageDetector):
    """``<prompt|none>/p<p>/t<t>/N<points>``: values ``(rows,)``, higher means memorized."""

    timesteps: tuple[int, ...]
    seed: int = 0

    name: ClassVar[str] = "p_laplace_sweep"

    def __call__(self, clean: Tensor, predict) -> dict[str, Tensor]:
        normals = random_directions(clean, max(POINTS), torch.Generator().manual_seed(self.seed))
        found = {}
        for t in self.timesteps:
            alpha, sigma = predict.noise_scales(t)
            radius = sigma * clean[0].numel() ** 0.5
            for cond in (True, False):
                score = partial(self._score, predict, t, sigma, cond)
                samples = boundary_samples(score, alpha * clean, radius, POWERS, normals)
                for p, values in zip(POWERS, samples, strict=True):
                    for n in POINTS:
                        found[f"{'prompt' if cond else 'none'}/p{p:g}/t{t}/N{n}"] = -values[:, :n].mean(1)
        return found

    @staticmethod
    def _score(predict, t: int, sigma: float, cond: bool, x: Tensor) -> Tensor:
        return -predict(x, t, cond) / sigma


def balanced(frame: pd.DataFrame, each: int) -> pd.DataFrame:
    """``each`` rows of either label, drawn by a seed."""
    return frame.sample(frac=1, random_state=0).groupby("label").head(each).reset_index(drop=True)


def table_of(rows: list[dict]) -> pd.DataFrame:
    """AUC by prompt, p, timestep and number of points."""
    labels = [row["label"] for row in rows]
    found = []
    for key in (key for key in rows[0] if key.count("/") == 3):
        prompt, p, t, n = key.split("/")
        auc = roc_auc_score(labels, [np.mean(row[key]) for row in rows])
        found.append({"prompt": prompt, "p": float(p[1:]), "t": int(t[1:]), "N": int(n[1:]), "auc": auc})
    return pd.DataFrame(found)


def draw(table: pd.DataFrame, path: Path, title: str) -> None:
    """AUC against the noise level, a line a p; with the prompt on the left, without on the right."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.8), sharey=True)
    for axis, prompt, name in zip(axes, ("prompt", "none"), ("with the prompt", "without"), strict=True):
        chosen = table[(table["prompt"] == prompt) & (table["N"] == max(POINTS))]
        for p, group in chosen.groupby("p"):
            axis.plot(group["t"], group["auc"], "o-", markersize=4, label=f"p = {p:g}")
        axis.axhline(0.5, color="grey", linewidth=0.8)
        axis.set(xlabel="timestep t", title=f"{name}, N = {max(POINTS)}", xscale="log")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("AUC")
    axes[0].legend(fontsize=8)
    figure.suptitle(title)
    save_figure(figure, path)


@shared
def main(arguments: Arguments = None) -> None:
    parser = ArgumentParser(description=__doc__)
    add_arguments(parser)
    add = parser.add_argument
    add("--each", type=value(Count), default=50, metavar="N", help="prompts of either label (default: %(default)s)")
    add("--timesteps", type=value(Timestep), nargs="+", default=[1, 10, 50, 200, 500], help="default: %(default)s")
    args = parser.parse_args(arguments)
    if args.each < 1 or not all(0 < t < 1000 for t in args.timesteps):
        parser.error("--each is at least 1, --timesteps lie between 1 and 999")
    subject = open_subject(args, "p_laplace_sweep")
    settings = {"each": args.each, "timesteps": args.timesteps}
    rows = scored(subject, [PLaplaceSweep(tuple(args.timesteps))], balanced(subject.frame, args.each), settings)
    table = table_of(rows)
    shown = table.pivot_table(index=["prompt", "p", "N"], columns="t", values="auc")
    print(f"AUC, {len(rows)} generated pictures; N UNet evaluations with the prompt, N without\n{shown.round(3)}")
    write_atomically(subject.out / "auc.csv", table.round(4).to_csv(index=False))
    draw(table, subject.out / "auc.png", f"p-Laplace detection, {subject.spec.name}, {len(rows)} pictures")
    print(f"{subject.out}/auc.csv, auc.png")


if __name__ == "__main__":
    run_script(main)
