"""Text-only scores."""

import numpy as np

from memorization.evaluation.metrics import tpr_at_fpr
from memorization.evaluation.text_baselines import capitals, naive_bayes


def test_capitals():
    assert capitals(["Red Kite", "red Kite", "", "no capitals at all"]).tolist() == [1.0, 0.5, 0.0, 0.0]


def test_naive_bayes_finds_a_telling_word_but_not_by_near_copies():
    rng = np.random.default_rng(0)
    labels = np.array([0, 1] * 100)
    families = np.array([f"f{i // 4}" for i in range(200)])
    telling = [f"{'shiny' if label else 'dull'} thing{rng.integers(50)}" for label in labels]
    assert tpr_at_fpr(labels, naive_bayes(telling, labels, families), 0.01)[0] > 0.9
    # The family's own word tells the label, but whole families are held out together.
    labels = np.repeat(rng.integers(0, 2, 50), 4)
    copies = [f"name{i // 4} common words" for i in range(200)]
    assert tpr_at_fpr(labels, naive_bayes(copies, labels, families), 0.01)[0] < 0.2
