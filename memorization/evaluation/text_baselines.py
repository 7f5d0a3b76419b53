"""Scores from the prompt's text alone: a benchmark on which they do well says little about a detector.

On the usual SD1.4 benchmark (memorized LAION captions against COCO-like sentences) the share of capitalised words alone
reaches an AUC above .98, without any model.
"""

from __future__ import annotations

import numpy as np
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.model_selection import StratifiedGroupKFold, cross_val_predict
from sklearn.naive_bayes import MultinomialNB
from sklearn.pipeline import make_pipeline


def capitals(prompts: list[str]) -> np.ndarray:
    """Share of the words that start with a capital letter, 0 for an empty prompt; ``(prompts,)``."""
    return np.array([np.mean([word[0].isupper() for word in prompt.split()] or [0.0]) for prompt in prompts])


def naive_bayes(prompts: list[str], labels: np.ndarray, families: np.ndarray, folds: int = 5) -> np.ndarray:
    """Out-of-fold log-odds of label 1 by naive Bayes on lower-cased words and word pairs; ``(prompts,)``.

    Folds keep whole families together, so near-copies cannot vouch for one another. With fewer families of a class than
    folds, fewer folds are used.
    """
    smallest = min(len(set(families[labels == label])) for label in (0, 1))
    if smallest < 2 or not any(prompt.split() for prompt in prompts):
        return np.zeros(len(prompts))
    words = CountVectorizer(lowercase=True, ngram_range=(1, 2), token_pattern=r"\S+")
    cv = StratifiedGroupKFold(min(folds, smallest), shuffle=True, random_state=0)
    log_p = cross_val_predict(
        make_pipeline(words, MultinomialNB(fit_prior=False)), prompts, labels,
        groups=families, cv=cv, method="predict_log_proba",
    )  # fmt: skip
    return log_p[:, 1] - log_p[:, 0]
