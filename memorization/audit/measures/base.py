"""What a measure is given and gives."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, NamedTuple

import numpy as np

from memorization.registry import Registry
from memorization.similarity.clip import Clip


class Known(NamedTuple):
    """What measures may use: the training pictures, uint8 ``(n, h, w, 3)``, a CLIP, and SSCD's preset."""

    pictures: np.ndarray
    clip: Clip | None
    sscd: str


class Measure(ABC):
    """How near pictures are to the training pictures.

    Attributes:
        lower_is_nearer: it is a distance; else a cosine.
        title: for people.
        revision: tells the network behind it from others; empty where there is none.
    """

    name: ClassVar[str]
    lower_is_nearer: ClassVar[bool]
    title: ClassVar[str]
    revision: str = ""

    @classmethod
    @abstractmethod
    def made(cls, known: Known) -> Measure | None:
        """The measure; None where what it needs is not there."""

    @abstractmethod
    def __call__(self, pictures: np.ndarray) -> np.ndarray:
        """``(pictures, training pictures)``, of uint8 ``(n, h, w, 3)``."""

    @abstractmethod
    def apart(self) -> np.ndarray:
        """The same of the training pictures themselves, ``(training, training)``."""

    def distances(self, values: np.ndarray) -> np.ndarray:
        """Values as distances: of a cosine that of the unit vectors."""
        return values if self.lower_is_nearer else np.sqrt(2 * np.maximum(0, 1 - values))

    def value_at(self, distance: float) -> float:
        """The value of two pictures of a :meth:`distances`."""
        return distance if self.lower_is_nearer else 1 - distance**2 / 2


MEASURES: Registry[Measure] = Registry(
    "measure",
    "memorization.audit.measures",
    ("sscd", "nl2", "clip"),  # the first that is there decides what a copy is
    "memorization.measures",
)


def make_measures(known: Known) -> list[Measure]:
    """Those that can be had, the one that decides first."""
    made = (MEASURES[name].made(known) for name in MEASURES)
    return [measure for measure in made if measure is not None]
