"""Scores that learn from the validation half."""

import numpy as np
from sklearn.metrics import roc_auc_score

from memorization.evaluation.learned import learned_combination, z_score_size


def test_combination_finds_the_direction_and_ignores_labels_it_may_not_see():
    rng = np.random.default_rng(0)
    labels = rng.integers(2, size=600)
    terms = rng.normal(size=(600, 3)) * [1, 100, 0.01]
    terms[:, 1] += 80 * labels
    terms[:, 2] -= 0.008 * labels
    learn = np.arange(600) < 300
    score = learned_combination(terms, labels, learn)
    assert roc_auc_score(labels[~learn], score[~learn]) > 0.76  # the best direction reaches Phi(1.13 / sqrt 2) = .79
    hidden = np.where(learn, labels, 1 - labels)
    assert (learned_combination(terms, hidden, learn) == score).all()


def test_z_scores():
    curves = np.array([[1.0, 10], [3, 10], [2, 10], [5, 11]])
    reference = np.array([True, True, False, False])
    assert z_score_size(curves, reference).tolist() == [np.sqrt(0.5), np.sqrt(0.5), 0.0, np.sqrt((9 + 1) / 2)]
