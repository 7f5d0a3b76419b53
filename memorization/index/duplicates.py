"""Near-copies and repeated captions in a training folder: what a fine-tune sees more often than its owner thinks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from memorization.io.figures import draw_strips
from memorization.io.pictures import read_picture, to_tensor
from memorization.io.training import pictures_of
from memorization.similarity.nl2 import l2

NEAR_COPY = 0.05  # l2 of pictures at 64 x 64, between 0 and 1: re-encoded or rescaled, but not another picture
THUMBNAIL = (64, 64)
WIDEST, MOST = 8, 16  # pictures of a group and groups on a sheet


class Duplicates(NamedTuple):
    """What comes more than once.

    Attributes:
        pictures: groups of near-copies.
        captions: caption -> the pictures that share it, but for case and white space.
    """

    pictures: list[list[Path]]
    captions: dict[str, list[Path]]


def find_duplicates(source: Path, limit: float = NEAR_COPY) -> Duplicates:
    """Near-copies and repeated captions of a training folder or list.

    Raises:
        InputError: there is no picture, or one that cannot be read.
    """
    found = pictures_of(source)
    files = list(found)
    families = near_copies(files, limit)
    groups = [[files[i] for i in np.flatnonzero(families == family)] for family in range(families.max() + 1)]
    shared: dict[str, list[Path]] = {}
    for file, caption in found.items():
        shared.setdefault(" ".join(caption.lower().split()), []).append(file)
    return Duplicates(
        [group for group in groups if len(group) > 1],
        {caption: own for caption, own in shared.items() if caption and len(own) > 1},
    )


def near_copies(files: Sequence[Path], limit: float = NEAR_COPY) -> np.ndarray:
    """Numbers of families ``(n,)``: pictures whose l2 is below ``limit`` share one, and so do their near-copies."""
    thumbnails = to_tensor(np.stack([read_picture(file, THUMBNAIL) for file in files]))
    family = np.arange(len(files))
    for i, row in enumerate(l2(thumbnails, thumbnails).numpy()):
        for other in set(family[row < limit]) - {family[i]}:
            family[family == other] = family[i]
    return np.unique(family, return_inverse=True)[1]


def draw(groups: Sequence[Sequence[Path]], path: Path) -> Path:
    """A contact sheet: a row a group, its first pictures."""
    blank = np.full((*THUMBNAIL, 3), 255, np.uint8)
    strips = {}
    for number, group in enumerate(groups[:MOST], 1):
        pictures = [read_picture(file, THUMBNAIL) for file in group[:WIDEST]]
        strips[f"{number}: {len(group)} near-copies, {group[0].name} the first"] = (
            pictures + [blank] * (WIDEST - len(pictures))
        )  # fmt: skip
    return draw_strips(strips, path)
