"""Scores that learn from the validation half of a list, and are scored on the rest."""

from __future__ import annotations

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

ONE_TRACE = ("norm", "cosine", "one_step")  # what the learned combination is made of: a single trace's scores


def learned_combination(terms: np.ndarray, labels: np.ndarray, learn: np.ndarray) -> np.ndarray:
    """Log-odds of label 1, ``(rows,)``, by logistic regression over ``terms (rows, k)`` on the rows ``learn``."""
    model = make_pipeline(StandardScaler(), LogisticRegression(class_weight="balanced", max_iter=1000))
    return model.fit(terms[learn], labels[learn]).decision_function(terms)


def z_score_size(curves: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Root mean square z-score of ``curves (rows, k)`` against the mean and spread of ``reference`` rows; ``(rows,)``.

    The rule of Broken Memories (see memorization/detectors/trajectory_z.py).
    """
    mean, spread = curves[reference].mean(0), curves[reference].std(0)
    spread[spread == 0] = 1.0
    return np.sqrt(np.square((curves - mean) / spread).mean(1))
