"""Frechet distance between two sets of features: of pictures, by any embedding.

    || mu_1 - mu_2 ||^2 + tr(C_1 + C_2 - 2 (C_1 C_2)^(1/2))

FID is this on Inception-v3 features (Heusel et al., NeurIPS 2017). Those weights cannot be had everywhere, so the
features are the caller's; name them beside a value. Values by different features, or of sets of different size,
cannot be compared.
"""

from __future__ import annotations

import numpy as np


def _root(matrix: np.ndarray) -> np.ndarray:
    """The symmetric square root of a symmetric matrix without negative eigenvalues."""
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * np.sqrt(values.clip(0))) @ vectors.T


def frechet_distance(left: np.ndarray, right: np.ndarray) -> float:
    """Between ``(n, width)`` and ``(m, width)``, at least two rows each; at least 0."""
    left, right = left.astype(np.float64), right.astype(np.float64)
    means = np.square(left.mean(0) - right.mean(0)).sum()
    first, second = np.cov(left, rowvar=False), np.cov(right, rowvar=False)
    root = _root(first)
    cross = np.sqrt(np.linalg.eigvalsh(root @ second @ root).clip(0)).sum()
    return float(max(0.0, means + np.trace(first) + np.trace(second) - 2 * cross))
