"""Cosine of features, as a base of measures."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from memorization.audit.measures.base import Measure


class Features(Measure):
    """Cosine of unit vectors that :meth:`describe` makes of pictures."""

    lower_is_nearer: ClassVar[bool] = False

    def __init__(self, training: np.ndarray, revision: str) -> None:
        self.revision = revision
        self._training = self.describe(training)

    def describe(self, pictures: np.ndarray) -> np.ndarray:
        """Unit vectors ``(n, width)`` of uint8 pictures ``(n, h, w, 3)``."""
        raise NotImplementedError

    def __call__(self, pictures: np.ndarray) -> np.ndarray:
        return self.describe(pictures) @ self._training.T

    def apart(self) -> np.ndarray:
        return self._training @ self._training.T
