"""How well a map finds a region of a picture whose mask is known."""

from __future__ import annotations

import numpy as np
from sklearn.metrics import roc_auc_score


def iou(mask: np.ndarray, found: np.ndarray) -> float:
    """Intersection over union of two regions, bool ``(h, w)``; 0 where both are empty."""
    return float((mask & found).sum() / max(1, (mask | found).sum()))


def otsu(values: np.ndarray) -> float:
    """The threshold that parts ``values`` into two classes of the largest variance between them (Otsu 1979).

    It lies halfway between the two values that it parts; values that are all equal are none of them above it.
    """
    ordered = np.sort(values, axis=None).astype(float)
    below = np.arange(1, len(ordered))
    sums = ordered.cumsum()
    low, high = sums[:-1] / below, (sums[-1] - sums[:-1]) / (len(ordered) - below)
    between = np.where(ordered[1:] > ordered[:-1], below * (len(ordered) - below) * (high - low) ** 2, -1.0)
    place = int(between.argmax())
    return float((ordered[place] + ordered[place + 1]) / 2)


def agreement(values: np.ndarray, mask: np.ndarray) -> dict[str, float]:
    """Of a map ``(h, w)`` with a mask, bool ``(h, w)``, which is neither empty nor everything.

    Returns:
        ``auc``: that a pixel of the region has a higher value than one outside; ``iou``: of the region above Otsu's
        threshold, which needs to know nothing; ``iou at its area``: of the highest pixels, as many as the mask has.
    """
    highest = np.zeros(mask.size, dtype=bool)
    highest[np.argsort(-values, axis=None, kind="stable")[: mask.sum()]] = True
    return {
        "auc": float(roc_auc_score(mask.ravel(), values.ravel())),
        "iou": iou(mask, values > otsu(values)),
        "iou at its area": iou(mask, highest.reshape(mask.shape)),
    }
