"""The pictures of an evaluation: ROC, score distributions, norm against cosine, score against duplication count."""

from __future__ import annotations

from pathlib import Path

import matplotlib

from memorization.io.figures import save_figure

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from memorization.evaluation.metrics import roc

COLOURS = {0: "#4477aa", 1: "#cc3311"}
NAMES = {0: "not memorized", 1: "memorized"}


def draw_roc(labels: np.ndarray, scores: dict[str, np.ndarray], path: Path, title: str) -> Path:
    """ROC curves of several detectors, FPR on a log axis that starts at one false positive."""
    figure, axis = plt.subplots(figsize=(5.2, 4.2))
    floor = 1 / (labels == 0).sum()
    for i, (name, values) in enumerate(scores.items()):
        fpr, tpr = roc(labels, values)
        style = ("-", "-", "-", "--")[i % 4]  # noise_norm often lies on norm
        axis.step(np.maximum(fpr, floor / 2), tpr, style, where="post", label=name)
    for target in (0.01, 0.03):
        axis.axvline(target, color="grey", linewidth=0.7, linestyle=":")
    axis.set(xscale="log", xlim=(floor / 2, 1), ylim=(0, 1.02), xlabel="false positive rate (dotted: 1%, 3%)",
             ylabel="true positive rate", title=title)  # fmt: skip
    axis.legend(loc="lower right", fontsize=8)
    return save_figure(figure, path)


def draw_distributions(labels: np.ndarray, scores: dict[str, np.ndarray], path: Path, title: str) -> Path:
    """Histograms of every score, memorized against not."""
    figure, axes = plt.subplots(1, len(scores), figsize=(3.3 * len(scores), 3), squeeze=False)
    for axis, (name, values) in zip(axes[0], scores.items(), strict=True):
        bins = np.histogram_bin_edges(values, 30)
        for label in (0, 1):
            axis.hist(values[labels == label], bins, density=True, alpha=0.6, color=COLOURS[label], label=NAMES[label])
        axis.set(xlabel=name, yticks=[])
    axes[0, 0].legend(fontsize=8)
    figure.suptitle(title)
    return save_figure(figure, path)


def draw_terms(labels: np.ndarray, norm: np.ndarray, cosine: np.ndarray, path: Path, title: str) -> Path:
    """The two terms of the anisotropy score against each other, a dot a prompt."""
    figure, axis = plt.subplots(figsize=(5.2, 4.2))
    for label in (0, 1):
        chosen = labels == label
        axis.scatter(norm[chosen], cosine[chosen], s=12, alpha=0.7, color=COLOURS[label], label=NAMES[label])
    axis.set(xlabel="norm of the guidance vector, first step", ylabel="cosine, third last step", title=title)
    axis.legend(fontsize=8)
    return save_figure(figure, path)


def draw_duplicates(rows: pd.DataFrame, score: np.ndarray, name: str, path: Path, title: str) -> Path:
    """Score against kind and duplication count, a dot a prompt, coloured by the measured replication rate."""
    groups = list(zip(rows["kind"], rows["duplicates"].astype(int), strict=True))
    order = {kind: i for i, kind in enumerate(dict.fromkeys(rows["kind"]))}
    places = {group: i for i, group in enumerate(sorted(set(groups), key=lambda group: (order[group[0]], group[1])))}
    x = np.array([places[group] for group in groups], dtype=float)
    x += np.random.default_rng(0).uniform(-0.25, 0.25, len(x))
    figure, axis = plt.subplots(figsize=(max(6.4, 0.36 * len(places)), 4.4))
    dots = axis.scatter(x, score, c=rows["replication"].astype(float), cmap="coolwarm", s=12, vmin=0, vmax=1)
    axis.set_xticks(range(len(places)), [f"{kind} x{n}" for kind, n in places], fontsize=8, rotation=60, ha="right")
    axis.set(xlabel="kind, and duplication count", ylabel=name, title=title)
    figure.colorbar(dots, label="replication rate")
    figure.tight_layout()
    return save_figure(figure, path)
