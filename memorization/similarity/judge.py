"""Everything that is measured of generated pictures, in one place for the scripts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from memorization.errors import InputError
from memorization.similarity.clip import Clip
from memorization.similarity.pixel import normalized_l2
from memorization.similarity.sscd import SSCD


def read_picture(path: Path, size: tuple[int, int]) -> np.ndarray:
    """uint8 ``(h, w, 3)``, brought to ``size`` (height, width).

    Raises:
        InputError: the file is no picture.
    """
    try:
        return np.asarray(Image.open(path).convert("RGB").resize(size[::-1], Image.Resampling.LANCZOS))
    except OSError as error:
        raise InputError(f"{path}: no picture that can be read ({error})") from None


def to_tensor(pictures: np.ndarray) -> Tensor:
    """uint8 ``(n, h, w, 3)`` -> float ``(n, 3, h, w)`` in [-1, 1]."""
    return torch.from_numpy(np.ascontiguousarray(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1


class Judge:
    """Measures pictures of a prompt against the prompt and against its training picture.

    Args:
        training: file of each known training picture; normalised l2 takes its neighbours from all of them.
        size: (height, width) of generated pictures.
        clip: for text alignment; left out where it cannot be had.
        sscd: the same for copy detection.
    """

    def __init__(
        self, training: Sequence[Path], size: tuple[int, int], clip: Clip | None = None, sscd: SSCD | None = None
    ) -> None:
        self.clip, self.sscd = clip, sscd
        self.place = {path: i for i, path in enumerate(dict.fromkeys(training))}
        pictures = np.stack([read_picture(path, size) for path in self.place]) if self.place else None
        self.training = to_tensor(pictures) if pictures is not None else None
        self.embedded = sscd(pictures) if sscd and pictures is not None else None

    def __call__(self, pictures: np.ndarray, prompt: str, image: Path | None) -> dict[str, list[float]]:
        """A value a picture under each name: ``clip``; ``nl2`` (lower is nearer) and ``sscd`` where ``image`` is known.

        Args:
            pictures: uint8 ``(n, h, w, 3)``.
            prompt: what was asked for, before any change.
            image: its training picture.
        """
        values = {}
        if self.clip:
            values["clip"] = self.clip.score(pictures, [prompt] * len(pictures)).tolist()
        if image is not None:
            place = self.place[image]
            values["nl2"] = normalized_l2(to_tensor(pictures), self.training)[:, place].tolist()
            if self.sscd:
                values["sscd"] = (self.sscd(pictures) @ self.embedded[place]).tolist()
        return {name: [round(value, 4) for value in column] for name, column in values.items()}
