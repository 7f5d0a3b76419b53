"""Spend noises where they are needed: stop at the first noise for prompts whose score is clearly on one side.

The rounds use 1, 2, 4 and 8 noises. After each, a prompt whose mean score so far lies outside the round's undecided
band is done. The bands are fitted on validation prompts that were scored with all the noises: a prompt may leave a
round on the wrong side of the final threshold in at most a share ``risk`` of the cases.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from memorization.evaluation.metrics import noise_mean

ROUNDS = (1, 2, 4, 8)
Bands = dict[int, tuple[float, float]]  # noises -> (low, high): undecided between them, ends included


def fit_bands(scores: np.ndarray, threshold: float, risk: float = 0.01) -> Bands:
    """The undecided band of every round but the last.

    Args:
        scores: ``(prompts, 8)``, a column a noise.
        threshold: of the mean over all noises; it must part the prompts.
        risk: share of the finally flagged (not flagged) prompts that may fall below (above) a band.
    """
    flagged = scores.mean(1) >= threshold
    if flagged.all() or not flagged.any():
        raise ValueError("the threshold parts no prompts: nothing to fit the bands on")
    bands = {}
    for n in ROUNDS[:-1]:
        mean = scores[:, :n].mean(1)
        low = float(np.quantile(mean[flagged], risk, method="lower"))
        high = float(np.quantile(mean[~flagged], 1 - risk, method="higher"))
        bands[n] = (min(low, threshold), max(high, threshold))
    return bands


def noises_needed(scores: Sequence[float], bands: Bands) -> int:
    """How many of a prompt's noises are scored before it is decided."""
    for n in ROUNDS[:-1]:
        low, high = bands[n]
        if not low <= noise_mean(scores, n) <= high:
            return n
    return ROUNDS[-1]
