"""Cosine of CLIP features, where a CLIP is given: nearness of content more than of the picture itself."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from memorization.audit.measures.base import MEASURES, Known
from memorization.audit.measures.features import Features


@MEASURES.register
class ByClip(Features):
    """``clip``: -1 to 1, higher is nearer."""

    name: ClassVar[str] = "clip"
    title: ClassVar[str] = "CLIP features"

    @classmethod
    def made(cls, known: Known) -> ByClip | None:
        return cls(known.clip, known.pictures) if known.clip else None

    def describe(self, pictures: np.ndarray) -> np.ndarray:
        return self._network.pictures(pictures).numpy()
