"""ROC, TPR at an FPR, intervals over families, paired tests, thresholds and fitted weights.

All curves are computed with row weights, so that a bootstrap resample of whole families is a row of weights and 2,000
resamples are one matrix product away.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from sklearn.linear_model import LogisticRegression

FPR_TARGETS = (0.01, 0.03)


def _rates(labels: np.ndarray, scores: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """FPR and TPR ``(b, thresholds + 1)`` of every "score >= threshold" rule, for each row of ``weights (b, rows)``.

    Equal scores are one threshold. The first column is the rule that flags nothing.
    """
    order = np.argsort(-scores, kind="stable")
    last_of_ties = np.append(np.nonzero(np.diff(scores[order]))[0], len(scores) - 1)
    result = []
    for of_class in (labels == 0, labels == 1):
        mass = np.cumsum((weights * of_class)[:, order], axis=1)[:, last_of_ties]
        total = mass[:, -1:]
        result.append(np.concatenate([np.zeros_like(total), mass / total], axis=1))
    return result[0], result[1]


def roc(labels: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """FPR and TPR, each ``(thresholds + 1,)``, of all distinct thresholds; higher scores mean label 1."""
    fpr, tpr = _rates(labels, scores, np.ones((1, len(labels))))
    return fpr[0], tpr[0]


def _auc(fpr: np.ndarray, tpr: np.ndarray) -> np.ndarray:
    return np.trapezoid(tpr, fpr, axis=-1)


def _tpr_at(fpr: np.ndarray, tpr: np.ndarray, target: float) -> tuple[np.ndarray, np.ndarray]:
    """The largest TPR with FPR <= target, and the FPR realised there."""
    place = (fpr <= target + 1e-12).sum(axis=-1, keepdims=True) - 1
    return np.take_along_axis(tpr, place, -1)[..., 0], np.take_along_axis(fpr, place, -1)[..., 0]


def tpr_at_fpr(labels: np.ndarray, scores: np.ndarray, target: float) -> tuple[float, float]:
    """(TPR, realised FPR): the largest TPR among thresholds whose FPR is at most ``target``."""
    fpr, tpr = roc(labels, scores)
    reached, realised = _tpr_at(fpr, tpr, target)
    return float(reached), float(realised)


def family_weights(families: np.ndarray, labels: np.ndarray | None, resamples: int, seed: int = 0) -> np.ndarray:
    """Bootstrap weights ``(resamples, rows)``: how often each row's family was drawn.

    Families are drawn with replacement, as many as there are.

    Args:
        labels: of both classes; a resample without both is drawn again. None where classes do not matter.
    """
    if labels is not None and len(np.unique(labels)) < 2:
        raise ValueError("rows of both classes are needed")
    rng = np.random.default_rng(seed)
    _, member = np.unique(families, return_inverse=True)
    count = member.max() + 1
    weights = []
    while len(weights) < resamples:
        drawn = np.bincount(rng.integers(count, size=count), minlength=count)[member]
        if labels is None or (drawn[labels == 0].any() and drawn[labels == 1].any()):
            weights.append(drawn)
    return np.array(weights)


@dataclass(frozen=True)
class Metrics:
    """Metrics of one score, each with its 95% interval over families.

    Attributes:
        values: ``auc``, ``tpr@1%``, ``tpr@3%`` -> (value, low, high).
        realised_fpr: ``tpr@1%``, ``tpr@3%`` -> the FPR at the threshold used.
        resampled: the metric's value in every resample, for paired tests.
    """

    values: dict[str, tuple[float, float, float]]
    realised_fpr: dict[str, float]
    resampled: dict[str, np.ndarray]


def measure(labels: np.ndarray, scores: np.ndarray, weights: np.ndarray) -> Metrics:
    """Metrics of ``scores`` against ``labels``, with percentile intervals from bootstrap ``weights``."""
    fpr, tpr = _rates(labels, scores, np.vstack([np.ones(len(labels)), weights]))
    columns = {"auc": _auc(fpr, tpr)}
    realised = {}
    for target in FPR_TARGETS:
        key = f"tpr@{target:.0%}"
        columns[key], at = _tpr_at(fpr, tpr, target)
        realised[key] = float(at[0])
    values = {}
    for key, column in columns.items():
        low, high = np.percentile(column[1:], [2.5, 97.5])
        values[key] = (float(column[0]), float(low), float(high))
    return Metrics(values, realised, {key: column[1:] for key, column in columns.items()})


def paired_difference(left: Metrics, right: Metrics, key: str = "auc") -> dict[str, float]:
    """``left - right`` on the same resamples: difference, 95% interval, two-sided bootstrap p-value."""
    difference = left.resampled[key] - right.resampled[key]
    low, high = np.percentile(difference, [2.5, 97.5])
    tail = min((difference <= 0).mean(), (difference >= 0).mean())
    return {
        "difference": left.values[key][0] - right.values[key][0],
        "low": float(low),
        "high": float(high),
        "p": float(min(1.0, 2 * max(tail, 1 / len(difference)))),
    }


def fit_weights(labels: np.ndarray, terms: np.ndarray) -> np.ndarray:
    """Weights of a sum of ``terms (rows, k)`` by logistic regression, scaled so that the first has size 1.

    The terms are standardised for the fit, so that its mild ridge penalty treats them alike.
    """
    spread = terms.std(axis=0)
    spread[spread == 0] = 1.0
    standardised = (terms - terms.mean(axis=0)) / spread
    model = LogisticRegression(class_weight="balanced", max_iter=1000).fit(standardised, labels)
    weights = model.coef_[0] / spread
    return weights / abs(weights[0])


def parts_by(values: Sequence, labels: np.ndarray) -> Iterator[tuple[object, np.ndarray]]:
    """Each of ``values (rows,)`` that a memorized row has, with the rows compared for it: its own, and all label 0.

    Empty cells are no value.
    """
    column = np.array(values, dtype=object)
    known = {value for value in column[labels == 1] if value is not None and value == value}
    for value in sorted(known, key=lambda value: (isinstance(value, str), value)):
        yield value, (labels == 0) | (column == value)


def threshold_at(labels: np.ndarray, scores: np.ndarray, target: float) -> tuple[float, float]:
    """(threshold, realised FPR): flag where score >= threshold; FPR at most ``target``, TPR the largest possible.

    It lies halfway between the two scores it parts, so that rounding moves no prompt across it.
    """
    negatives = np.sort(scores[labels == 0])[::-1]
    below = negatives[int(np.floor(target * len(negatives) + 1e-9))]  # the highest score that must not be flagged
    higher = scores[scores > below]
    threshold = float((below + higher.min()) / 2) if len(higher) else float(np.nextafter(below, np.inf))
    return threshold, float((negatives >= threshold).mean())


def noise_mean(values: Sequence[float], noises: int | None = None) -> float:
    """A prompt's score: the mean over its first ``noises`` noises (default: all)."""
    return float(np.mean(values[:noises]))
