"""Cosine of features, as a base of measures."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

import numpy as np

from memorization.audit.measures.base import Measure


class Features(Measure):
    """Cosine of unit vectors that :meth:`describe` makes of pictures.

    Args:
        network: that makes them; its name and revision tell it from others.
    """

    lower_is_nearer: ClassVar[bool] = False

    def __init__(self, network: Any, training: np.ndarray) -> None:
        self._network, self.revision = network, f"{network.name}, {network.revision}"
        self._training = self.describe(training)

    @abstractmethod
    def describe(self, pictures: np.ndarray) -> np.ndarray:
        """Unit vectors ``(n, width)`` of uint8 pictures ``(n, h, w, 3)``."""

    def __call__(self, pictures: np.ndarray) -> np.ndarray:
        return self.describe(pictures) @ self._training.T

    def apart(self) -> np.ndarray:
        return self._training @ self._training.T
