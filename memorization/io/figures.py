"""Figures as files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np


def save_figure(figure: plt.Figure, path: Path) -> Path:
    """Write a figure and let go of it; its folder is made if missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path


def draw_strips(strips: dict[str, Sequence[np.ndarray]], path: Path, title: str = "") -> Path:
    """Named rows of pictures, uint8 ``(h, w, 3)`` of one size, as many in each: column i is one case."""
    columns = len(next(iter(strips.values())))
    figure, axes = plt.subplots(len(strips), 1, figsize=(0.8 * columns, 1.02 * len(strips)), squeeze=False)
    for axis, (name, pictures) in zip(axes[:, 0], strips.items(), strict=True):
        axis.imshow(np.concatenate(list(pictures), axis=1))
        axis.set_title(name, fontsize=8, loc="left", pad=2)
        axis.axis("off")
    if title:
        figure.suptitle(title, fontsize=8)
    return save_figure(figure, path)
