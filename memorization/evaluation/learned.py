"""Scores that learn from the validation half of a list, and are scored on the rest."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

ONE_TRACE = ("norm", "cosine", "one_step")  # what the learned combination is made of: a single trace's scores


def learned_combination(terms: np.ndarray, labels: np.ndarray, learn: np.ndarray) -> np.ndarray:
    """Log-odds of label 1, ``(rows,)``, by logistic regression over ``terms (rows, k)`` on the rows ``learn``."""
    model = make_pipeline(StandardScaler(), LogisticRegression(class_weight="balanced", max_iter=1000))
    return model.fit(terms[learn], labels[learn]).decision_function(terms)


def joint_z_score(curves: Sequence[np.ndarray], reference: np.ndarray) -> np.ndarray:
    """How far all curves lie from the ``reference`` rows at once, at the step where they do most; ``(rows,)``.

    The largest over steps of the smallest over curves of |z|, z against mean and spread of the reference rows at that
    step. The rule of Broken Memories (see memorization/detectors/trajectory_z.py).

    Args:
        curves: each ``(rows, steps)``.
    """
    values = np.stack(curves)
    mean, spread = values[:, reference].mean(1, keepdims=True), values[:, reference].std(1, keepdims=True)
    spread[spread == 0] = 1.0
    return np.abs((values - mean) / spread).min(0).max(1)
