"""Figures as files."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from PIL import Image

from memorization.io.files import replacing, writing


def save_figure(figure: plt.Figure, path: Path) -> Path:
    """Write a figure and let go of it; its folder is made if missing.

    Titles and labels are shown as they are: prompts and names of folders may hold a dollar sign.

    Raises:
        InputError: it cannot be written.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    for axis in figure.axes:
        for text in (axis.title, axis._left_title, axis.xaxis.label, axis.yaxis.label, *_legend(axis)):  # ty: ignore
            _literal(text)
    for text in figure.texts:  # its title
        _literal(text)
    with replacing(path) as part, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")  # the font lacks letters of some prompts
        figure.tight_layout()
        figure.savefig(part, dpi=120, format=path.suffix[1:])
    plt.close(figure)
    return path


def _literal(text: plt.Text) -> None:
    text.set_parse_math(False)
    text.set_text(text.get_text().encode("utf-8", "backslashreplace").decode())  # no font has half of a letter


def _legend(axis: plt.Axes) -> list[plt.Text]:
    return legend.get_texts() if (legend := axis.get_legend()) else []


def draw_strips(strips: Mapping[str, Sequence[np.ndarray]], path: Path, title: str = "") -> Path:
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


def overlay(picture: np.ndarray, values: np.ndarray, share: float = 0.6) -> np.ndarray:
    """A map ``(h, w)`` as a heat map over a picture, uint8 ``(H, W, 3)``: its lowest value dark, its highest bright.

    Args:
        share: of the heat map's colour in each pixel.
    """
    low, high = float(values.min()), float(values.max())
    scaled = (values - low) / (high - low or 1.0)
    heat = matplotlib.colormaps["inferno"](enlarged(scaled, (picture.shape[0], picture.shape[1])))[..., :3] * 255
    return (share * heat + (1 - share) * picture).round().astype(np.uint8)


def enlarged(values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A map ``(h, w)`` at a picture's ``size`` (height, width), bilinear."""
    image = Image.fromarray(values.astype(np.float32))
    return np.asarray(image.resize(size[::-1], Image.Resampling.BILINEAR))
