"""Normalised pixel l2, AMG eq. 8: see memorization/similarity/nl2.py.

Deviation: a training set of fewer than 50 pictures has as many neighbours as it has pictures. Values of such sets
cannot be compared with the field's limits; an audit's limits come from the base model's own pictures.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch

from memorization.audit.measures.base import MEASURES, Known, Measure
from memorization.io.pictures import to_tensor
from memorization.similarity.nl2 import NEIGHBOURS, l2, normalized, normalized_l2


@MEASURES.register
class ByNl2(Measure):
    """``nl2``: at least 0, lower is nearer."""

    name: ClassVar[str] = "nl2"
    title: ClassVar[str] = "normalised pixel l2"
    lower_is_nearer: ClassVar[bool] = True

    def __init__(self, training: np.ndarray) -> None:
        self._training = torch.from_numpy(training).permute(0, 3, 1, 2)

    @classmethod
    def made(cls, known: Known) -> ByNl2:
        return cls(known.pictures)

    def __call__(self, pictures: np.ndarray) -> np.ndarray:
        return normalized_l2(to_tensor(pictures), self._training).numpy()

    def apart(self) -> np.ndarray:
        """Of each to the others, which alone are its neighbours."""
        distance = l2(self._training.float() / 127.5 - 1, self._training)
        distance.fill_diagonal_(torch.inf)
        nearest = distance.topk(min(NEIGHBOURS, len(distance) - 1), largest=False).values
        return normalized(distance, nearest).numpy()
