"""Pictures and tensors of a run of mitigation, in memory or as files, and their contact sheet."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from safetensors.torch import load_file, save_file
from torch import Tensor

from memorization.io.figures import save_figure
from memorization.io.files import replacing, writing
from memorization.io.pictures import read_picture, save_picture


class KeptInMemory:
    """Pictures and tensors of a run, by the number of the prompt."""

    def __init__(self) -> None:
        self._pictures: dict[int, dict[str, np.ndarray]] = {}
        self._tensors: dict[int, dict[str, Tensor]] = {}

    def start(self, anew: bool) -> None:
        """Nothing to make ready."""

    def add(self, number: int, pictures: dict[str, np.ndarray], tensors: dict[str, Tensor]) -> None:
        """Keep what came of a prompt: pictures ``before`` and ``after``, and the tensors that were changed."""
        self._pictures[number], self._tensors[number] = pictures, tensors

    def pictures(self, number: int, when: str) -> np.ndarray:
        """uint8 ``(noises, h, w, 3)``."""
        return self._pictures[number][when]

    def tensors(self, number: int) -> dict[str, Tensor]:
        """``prompt_embeds (1, tokens, width)``, with what else the model's pipeline takes of a prompt, and ``latents
        (noises, c, h, w)``, packed where the pipeline takes them so; whichever the remedy changed."""
        return self._tensors[number]


class KeptInFolder:
    """The same as files: ``images/<id>-before-<n>.png``, ``images/<id>-after-<n>.png``, ``embeds/<id>.safetensors``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def start(self, anew: bool) -> None:
        """Make the folders; ``anew``: without what a run that was overwritten left there."""
        for name in ("images", "embeds"):
            if anew:
                shutil.rmtree(self.folder / name, ignore_errors=True)
            with writing(self.folder / name):
                (self.folder / name).mkdir(exist_ok=True)

    def add(self, number: int, pictures: dict[str, np.ndarray], tensors: dict[str, Tensor]) -> None:
        """As :meth:`KeptInMemory.add`; no file of tensors where the remedy changed none."""
        for when, own in pictures.items():
            for n, picture in enumerate(own):
                save_picture(picture, self._picture(number, when, n))
        if tensors:  # a file with the memorized prompt's own embedding would be no remedy
            with replacing(self._tensors(number)) as part:
                save_file(tensors, part)

    def pictures(self, number: int, when: str) -> np.ndarray:
        """As :meth:`KeptInMemory.pictures`."""
        count = len(list((self.folder / "images").glob(f"{number:04d}-{when}-*.png")))
        return np.stack([read_picture(self._picture(number, when, n), None) for n in range(count)])

    def tensors(self, number: int) -> dict[str, Tensor]:
        """As :meth:`KeptInMemory.tensors`."""
        return load_file(self._tensors(number)) if self._tensors(number).is_file() else {}

    def _picture(self, number: int, when: str, n: int) -> Path:
        return self.folder / "images" / f"{number:04d}-{when}-{n}.png"

    def _tensors(self, number: int) -> Path:
        return self.folder / "embeds" / f"{number:04d}.safetensors"


Kept = KeptInFolder | KeptInMemory


def contact_sheet(
    kept: Kept, rows: list[dict], training: Sequence[Path | None], count: int, path: Path, limit: int = 16
) -> Path:
    """Training picture, ``count`` pictures before and as many after, a row a prompt."""
    rows = rows[:limit]
    figure, axes = plt.subplots(
        len(rows), 3, figsize=(1.1 * (1 + 2 * count), 1.25 * len(rows)), width_ratios=[1, count, count], squeeze=False
    )
    for row, image, (left, middle, right) in zip(rows, training, axes, strict=False):
        for axis, key, when in ((middle, "prompt", "before"), (right, "new_prompt", "after")):
            pictures = kept.pictures(row["id"], when)
            axis.imshow(np.concatenate(list(pictures), axis=1))
            score = f": {row[f'score_{when}']:.3g}" if f"score_{when}" in row else ""
            axis.set_title(row[key][:60] + score, fontsize=7, loc="left", pad=2, parse_math=False)
        if image is not None:
            left.imshow(read_picture(image, pictures.shape[1:3]))
    for axis in axes.flat:
        axis.axis("off")
    axes[0, 0].set_title("training", fontsize=7, pad=2)
    figure.suptitle("training picture | before | after: score", fontsize=8)
    return save_figure(figure, path)
