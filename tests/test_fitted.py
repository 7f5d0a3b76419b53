"""Scores that learn from the validation half."""

import numpy as np
import pandas as pd
from sklearn.metrics import roc_auc_score

from memorization.evaluation.learned import joint_z_score, learned_combination
from memorization.evaluation.runs import Run


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
    """Both curves have to be far at one step; reference: means 2 and 20 and deviations 1 and 2, then 10 and 1."""
    moved = np.array([[1.0, 10], [3, 10], [7, 10], [-2, 14], [2, 15]])
    clean = np.array([[18.0, 10], [22, 10], [20, 15], [28, 7], [28, 10]])
    reference = np.array([True, True, False, False, False])
    # Far at different steps: 0. Row 3: min(4, 4) at the first step, min(4, 3) at the second. Row 4: never both.
    assert joint_z_score([moved, clean], reference).tolist() == [1, 1, 0, 4, 0]


def test_curves_are_judged_by_the_ordinary_prompts_of_the_validation_half_over_the_noises_asked_for():
    rng = np.random.default_rng(1)
    frame = pd.DataFrame({
        "prompt": [f"p{i}" for i in range(40)], "family": [f"f{i}" for i in range(40)], "label": [0, 1] * 20,
        "split": ["validation"] * 20 + ["test"] * 20,
        "a": rng.normal(size=(40, 3, 5)).tolist(), "b": rng.normal(2, 3, size=(40, 3, 5)).tolist(),
    })  # fmt: skip
    settings = {"model": "m", "num_images": 3, "detectors": {"way": {"terms": [], "curves": ["a", "b"]}}}
    run = Run(frame, settings)
    reference = np.arange(40) < 20
    reference[1::2] = False
    for noises in (1, 3):
        curves = [np.array(frame[name].tolist())[:, :noises].mean(1) for name in ("a", "b")]
        z = [np.abs(curve - curve[reference].mean(0)) / curve[reference].std(0) for curve in curves]
        expected = np.minimum(*z).max(1)[20:]
        np.testing.assert_allclose(run.fitted(noises)["way"], expected)
