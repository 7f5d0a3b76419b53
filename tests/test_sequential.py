"""Sequential scoring."""

import numpy as np
import pytest
from conftest import PROMPTS, load_tiny

from memorization.detectors.base import make_detectors
from memorization.evaluation.bands import ROUNDS, fit_bands, noises_needed
from memorization.runs.scorer import Scorer, SequentialScorer


def test_bands_leave_clear_cases_alone():
    rng = np.random.default_rng(0)
    truth = rng.random(400) < 0.5
    scores = np.where(truth, 2.0, 0.0)[:, None] + rng.normal(0, 0.8, (400, 8))
    bands = fit_bands(scores, 1.0)
    used = np.array([noises_needed(row, bands) for row in scores])
    decided = np.array([row[:n].mean() >= 1 for row, n in zip(scores, used, strict=True)])
    assert (decided == (scores.mean(1) >= 1)).mean() > 0.97
    assert set(used) <= set(ROUNDS) and used.mean() < 4
    assert noises_needed([9.0] * 8, bands) == 1 and noises_needed([1.0] * 8, bands) == 8


def test_a_threshold_that_parts_nothing_is_refused():
    with pytest.raises(ValueError, match="nothing to fit"):
        fit_bands(np.ones((5, 8)), 2.0)


def test_scores_are_those_of_a_fixed_number_of_noises():
    pipe = load_tiny("tiny-eps")
    detectors = make_detectors(["noise_norm"], {})
    common = dict(seed=51, steps=50, batch_size=8)
    full = Scorer(pipe, detectors, noises=8, **common)(PROMPTS)
    means = [np.mean(row["noise_norm"]) for row in full]
    middle = float(np.median(means))
    bands = {n: (middle - 1e-3, middle + 1e-3) for n in ROUNDS[:-1]}

    def score(bands):
        return SequentialScorer(pipe, detectors, detector="noise_norm", bands=bands, **common)(PROMPTS)

    rows = score(bands)
    for row, whole in zip(rows, full, strict=True):
        n = noises_needed(whole["noise_norm"], bands)
        assert row["noise_norm"] == pytest.approx(whole["noise_norm"][:n], rel=1e-4, abs=1e-5)
    everyone = {n: (-1.0, 1e9) for n in ROUNDS[:-1]}
    for row, whole in zip(score(everyone), full, strict=True):
        assert row["noise_norm"] == pytest.approx(whole["noise_norm"], rel=1e-4, abs=1e-5)  # all eight
