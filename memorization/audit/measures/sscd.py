"""Cosine of SSCD features, where its weights are: see memorization/similarity/sscd.py."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from memorization.audit.measures.base import MEASURES, Known
from memorization.audit.measures.features import Features
from memorization.similarity.sscd import SSCD, find_weights


@MEASURES.register
class BySscd(Features):
    """``sscd``: -1 to 1, higher is nearer."""

    name: ClassVar[str] = "sscd"
    title: ClassVar[str] = "SSCD"

    @classmethod
    def made(cls, known: Known) -> BySscd | None:
        return cls(SSCD(known.sscd), known.pictures) if find_weights() else None

    def describe(self, pictures: np.ndarray) -> np.ndarray:
        return self._network(pictures)
