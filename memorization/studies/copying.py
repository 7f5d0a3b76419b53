"""How near pictures are to the training set, by nL2 and by a second measure, and how far from what they should be."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import interpolate

from memorization.errors import InputError
from memorization.index.store import Index
from memorization.io.figures import draw_strips
from memorization.io.pictures import read_picture, to_bytes, to_tensor
from memorization.paths import ROOT
from memorization.similarity.clip import Clip
from memorization.similarity.frechet import frechet_distance
from memorization.similarity.nl2 import normalized_l2

Embed = Callable[[np.ndarray], np.ndarray]  # uint8 (n, h, w, 3) -> unit vectors (n, width)


def training_pictures(index: Index, size: tuple[int, int]) -> np.ndarray:
    """uint8 ``(n, h, w, 3)`` of ``size`` (height, width): an index of pixels has its own, others say where they lie.

    Raises:
        InputError: the index holds pixels of another size, or a file cannot be read.
    """
    if index.kind != "pixels":
        return np.stack([read_picture(ROOT / path, size) for path in index.files])
    if index.size != size:
        raise InputError(
            f"the index holds pictures of {index.size}, not of {size}: build it with --size {size[0]} {size[1]}"
        )
    return to_bytes(index.vectors(slice(None)).unflatten(1, (3, *size)))


class Copying:
    """Measures of copying, a value a picture, each to its own nearest training picture.

    Args:
        training: uint8 ``(n, h, w, 3)``, of the size of the pictures to measure.
        name, embed: of the measure that stands beside nL2: the cosine of these features.
        limits: measure -> the values at which a table counts copies.
    """

    def __init__(self, training: np.ndarray, name: str, embed: Embed, limits: Mapping[str, Sequence[float]]) -> None:
        self.training, self.name, self.embed, self.limits = training, name, embed, limits
        self.pixels = torch.from_numpy(training).permute(0, 3, 1, 2)
        self.features = np.asarray(embed(training))

    def distances(self, pictures: np.ndarray) -> np.ndarray:
        """nL2 of uint8 ``(n, h, w, 3)`` to every training picture."""
        return normalized_l2(to_tensor(pictures), self.pixels).numpy()

    def __call__(self, pictures: np.ndarray) -> dict[str, np.ndarray]:
        """``nl2`` (lower is nearer) and the cosine (higher is nearer)."""
        cosine = (np.asarray(self.embed(pictures)) @ self.features.T).max(1)
        return {"nl2": self.distances(pictures).min(1), self.name: cosine}

    def columns(self, values: Mapping[str, np.ndarray]) -> dict[str, float]:
        """What a table says of one row's values: nearest 5%, nearest, and the shares beyond each limit."""
        found = {}
        for name, v in ((name, values[name]) for name in ("nl2", self.name)):
            low = name == "nl2"
            found[f"{name} top 5%"] = np.quantile(v, 0.05 if low else 0.95)
            found[f"{name} top 1"] = v.min() if low else v.max()
            for limit in self.limits.get(name, ()):
                found[f"{name} {'<' if low else '>'} {limit:g}"] = (v < limit if low else v > limit).mean()
        return {name: float(value) for name, value in found.items()}

    def sheet(self, strips: dict[str, np.ndarray], path: Path) -> Path:
        """The training picture nearest to each picture of the first strip, above the strips."""
        nearest = self.distances(next(iter(strips.values()))).argmin(1)
        return draw_strips({"nearest training picture": self.training[nearest], **strips}, path)


class Reference:
    """Frechet distance, on the features of ``clip``, to the pictures of an index, each counted once.

    Pictures are brought to the index's size first, so that both sides are about as sharp.
    """

    def __init__(self, index: Index, clip: Clip) -> None:
        self.clip, self.size = clip, index.size or (224, 224)
        self.features = clip.pictures(training_pictures(index, self.size)).numpy()

    def embed(self, pictures: np.ndarray) -> np.ndarray:
        """Features ``(n, width)`` of uint8 ``(n, h, w, 3)``."""
        if pictures.shape[1:3] != self.size:
            pictures = to_bytes(interpolate(to_tensor(pictures), self.size, mode="bicubic", antialias=True))
        return self.clip.pictures(pictures).numpy()

    def distance(self, features: np.ndarray) -> float:
        """Of features that :meth:`embed` gave."""
        return frechet_distance(features, self.features)
