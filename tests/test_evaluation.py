"""Metrics against scikit-learn, brute force and known answers."""

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import roc_auc_score

from memorization.errors import InputError
from memorization.evaluation import metrics as ev
from memorization.evaluation.report import by_table, evaluate, table
from memorization.evaluation.runs import Run
from memorization.runs.calibrate import calibrate


@pytest.fixture
def data():
    rng = np.random.default_rng(0)
    labels = (rng.random(300) < 0.3).astype(int)
    scores = np.round(rng.normal(size=300) + labels, 1)  # rounding makes ties
    return labels, scores


def brute_tpr_at(labels, scores, target):
    best = (0.0, 0.0)
    for threshold in np.unique(scores):
        fpr, tpr = (scores[labels == 0] >= threshold).mean(), (scores[labels == 1] >= threshold).mean()
        if fpr <= target and tpr >= best[0]:
            best = (tpr, fpr)
    return best


def test_auc_equals_scikit_learn(data):
    labels, scores = data
    weights = np.random.default_rng(1).integers(0, 3, (20, 300))
    fpr, tpr = ev._rates(labels, scores, weights)
    expected = [roc_auc_score(labels, scores, sample_weight=w) for w in weights]
    np.testing.assert_allclose(ev._auc(fpr, tpr), expected, rtol=1e-10)


@pytest.mark.parametrize("target", [0.0, 0.01, 0.03, 0.5])
def test_tpr_at_fpr_is_the_largest_with_fpr_below_the_target(data, target):
    assert ev.tpr_at_fpr(*data, target) == pytest.approx(brute_tpr_at(*data, target))


def test_tpr_at_fpr_never_exceeds_the_target():
    labels = np.array([1, 0, 1] + [0] * 89)
    scores = -np.arange(92.0)
    assert ev.tpr_at_fpr(labels, scores, 0.01) == (0.5, 0.0)  # with 90 negatives, one false alarm is above 1%
    assert ev.tpr_at_fpr(labels, scores, 0.02) == (1.0, pytest.approx(1 / 90))


def test_the_realised_fpr_is_that_of_the_rows_themselves(data):
    metrics = ev.measure(*data, ev.family_weights(np.arange(300), data[0], 100))
    for key, target in (("tpr@1%", 0.01), ("tpr@3%", 0.03)):
        assert (metrics.values[key][0], metrics.realised_fpr[key]) == pytest.approx(brute_tpr_at(*data, target))
    assert 0 < metrics.realised_fpr["tpr@3%"] <= 0.03


def test_constant_scores_tell_nothing():
    labels = np.array([0, 1] * 20)
    assert ev.tpr_at_fpr(labels, np.zeros(40), 0.01) == (0.0, 0.0)
    metrics = ev.measure(labels, np.zeros(40), np.ones((100, 40)))
    assert metrics.values["auc"][0] == 0.5


def test_bootstrap_draws_whole_families():
    families = np.array(["a", "a", "a", "b", "b", "c", "d", "e"])
    labels = np.array([1, 1, 1, 0, 0, 1, 0, 0])
    weights = ev.family_weights(families, labels, 200)
    for name in "ab":
        assert (np.ptp(weights[:, families == name], axis=1) == 0).all()
    first = [np.flatnonzero(families == name)[0] for name in "abcde"]
    assert (weights[:, first].sum(axis=1) == 5).all()


def test_families_widen_the_interval():
    """Ten-fold copies of 30 rows say no more than the 30 rows do."""
    rng = np.random.default_rng(0)
    labels, scores = np.repeat(rng.integers(0, 2, 30), 10), np.repeat(rng.normal(size=30), 10)
    width = {}
    for name, families in {"rows": np.arange(300), "families": np.repeat(np.arange(30), 10)}.items():
        _, low, high = ev.measure(labels, scores, ev.family_weights(families, labels, 500)).values["auc"]
        width[name] = high - low
    assert width["families"] > 2 * width["rows"]


def test_interval_covers_the_truth():
    """AUC of N(1, 1) against N(0, 1) is Phi(1 / sqrt 2) = .7602; 95% intervals should cover it nearly always."""
    covered = 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        labels = np.array([0, 1] * 60)
        scores = rng.normal(size=120) + labels
        _, low, high = ev.measure(labels, scores, ev.family_weights(np.arange(120), labels, 400)).values["auc"]
        covered += low <= 0.76025 <= high
    assert covered >= 52


def test_paired_test_sees_a_difference_and_its_absence(data):
    labels, scores = data
    weights = ev.family_weights(np.arange(300), labels, 500)
    noisy = ev.measure(labels, scores + np.random.default_rng(2).normal(0, 3, 300), weights)
    good = ev.measure(labels, scores, weights)
    found = ev.paired_difference(good, noisy)
    assert found["difference"] > 0 and found["low"] > 0 and found["p"] < 0.05
    same = ev.paired_difference(good, good)
    assert same["difference"] == 0 and same["p"] == 1.0


def test_paired_test_by_hand():
    """Of ten resamples two are below 0 and one at 0: the smaller tail is 3 of 10, and both sides count."""
    resampled = np.array([-2.0, -1, 0, 1, 2, 3, 4, 5, 6, 7])
    left, right = (ev.Metrics({"auc": (value, 0, 0)}, {}, {"auc": column})
                   for value, column in ((0.9, 5 + resampled), (0.7, np.full(10, 5.0))))  # fmt: skip
    found = ev.paired_difference(left, right)
    assert found["p"] == pytest.approx(0.6) and found["difference"] == pytest.approx(0.2)
    assert (found["low"], found["high"]) == pytest.approx(tuple(np.percentile(resampled, [2.5, 97.5])))
    assert ev.paired_difference(right, left)["p"] == pytest.approx(0.6)
    far = ev.Metrics({"auc": (0.9, 0, 0)}, {}, {"auc": np.full(10, 9.0)})
    assert ev.paired_difference(far, right)["p"] == pytest.approx(0.2)  # no less than what ten resamples can say


def test_a_calibration_by_hand():
    """Levels and threshold of ordinary validation prompts, by the mean over the noises; the test half has no part."""
    rows = [{"prompt": f"v{i}", "family": f"v{i}", "label": 0, "split": "validation", "mine": [i - 1.0, i + 1.0]}
            for i in range(101)]  # fmt: skip
    rows += [{"prompt": f"m{i}", "family": f"m{i}", "label": 1, "split": "validation", "mine": [200.0 + i] * 2}
             for i in range(50)]  # fmt: skip
    rows += [{"prompt": f"t{i}", "family": f"t{i}", "label": i % 2, "split": "test", "mine": [1e4, 1e4]}
             for i in range(10)]  # fmt: skip
    settings = {"model": "m", "num_images": 2, "steps": 50, "detectors": {"mine": {"terms": ["mine"]}}}
    made = calibrate(Run(pd.DataFrame(rows), settings), 0.01)
    assert (made["negatives"], made["positives"]) == (101, 50)
    mine = made["detectors"]["mine"]
    assert mine["levels"] == {0.25: 25, 0.5: 50, 0.75: 75, 0.9: 90, 0.99: 99}
    assert mine["threshold"] == 99.5 and mine["realised_fpr"] == pytest.approx(1 / 101)


def test_a_weighed_score_is_calibrated_with_its_fitted_weights():
    """Threshold and levels are those of the fitted sum, weights fitted to the means over the noises."""
    rng = np.random.default_rng(0)
    labels = np.arange(200) % 2
    first = rng.normal(size=200)[:, None] + labels[:, None] + rng.normal(0, 1, (200, 4))
    second = 0.2 * labels[:, None] + rng.normal(0, 0.3, (200, 4))
    rows = pd.DataFrame({
        "prompt": "p", "family": np.arange(200), "label": labels, "norm": first.tolist(), "cosine": second.tolist(),
        "anisotropy": np.zeros((200, 4)).tolist(),
    })  # fmt: skip
    own = {"norm_weight": 1.0, "variant": "eps", "terms": ["anisotropy", "norm", "cosine"]}
    run = Run(rows, {"model": "m", "num_images": 4, "steps": 50, "detectors": {"anisotropy": own}})
    entry = calibrate(run, 0.1)["detectors"]["anisotropy"]
    weights = ev.fit_weights(labels, np.stack([first.mean(1), second.mean(1)], axis=1))
    fitted = [entry["settings"][name] for name in ("norm_weight", "cosine_weight")]
    assert fitted == pytest.approx(weights, rel=1e-3) and entry["settings"]["variant"] == "eps"
    score = (fitted[0] * first + fitted[1] * second).mean(1)
    assert entry["levels"][0.5] == pytest.approx(np.median(score[labels == 0]), rel=1e-4)
    assert entry["threshold"] == pytest.approx(ev.threshold_at(labels, score, 0.1)[0])


def test_a_fit_weighs_both_classes_alike():
    """Twenty ordinary rows for each memorized one move the boundary, not the direction; repeated rows move nothing."""
    rng = np.random.default_rng(0)
    labels = (np.arange(400) % 20 == 0).astype(int)
    terms = rng.normal(size=(400, 2)) + labels[:, None] * [1.0, 2.0]
    repeat = np.where(labels == 1, 19, 1)
    terms_twice, labels_twice = (np.repeat(x, repeat, axis=0) for x in (terms, labels))
    balanced = ev.fit_weights(labels_twice, terms_twice)
    assert ev.fit_weights(labels, terms) == pytest.approx(balanced, rel=0.05)


def test_a_run_is_measured_on_its_other_half_by_the_first_noises_and_at_the_price_of_each_term():
    """The scored rows leave the validation half out; a score at n = 1 is that of the first noise."""
    rng = np.random.default_rng(0)
    labels = np.arange(80) % 2
    frame = pd.DataFrame({
        "prompt": "p", "family": np.arange(80), "label": labels,
        "split": ["validation", "validation", "test", "test"] * 20,
        "noise_norm": rng.normal(size=(80, 2)).tolist(), "way": (rng.normal(size=(80, 2)) + labels[:, None]).tolist(),
        "way_5": rng.normal(size=(80, 2)).tolist(), "norm": rng.normal(size=(80, 2)).tolist(),
        "cosine": rng.normal(size=(80, 2)).tolist(),
    })  # fmt: skip
    detectors = {"noise_norm": {"terms": ["noise_norm"]}, "way": {"terms": ["way", "way_5"]},
                 "sum": {"terms": ["norm", "cosine"]}}  # fmt: skip
    settings = {"model": "m", "num_images": 2, "detectors": detectors}
    cost = {"needs": "generation", "seconds": 1.0}
    costs = {"way": {**cost, "evaluations": 100}, "way_5": {**cost, "evaluations": 10}}
    frame["family"] = frame["family"] // 8  # five families a half, of both labels
    frame["prompt"] = np.where((frame["split"] == "test") == (frame["label"] == 1), "ABC DEF", "abc def")
    metrics = evaluate(Run(frame, settings, costs=costs), resamples=100, sum_weights=(2.0, -3.0))
    assert metrics["counts"]["memorized"] == metrics["counts"]["left_out_validation"] // 2 == 20
    test = (frame["split"] == "test").to_numpy()
    weights = ev.family_weights(frame["family"][test].to_numpy().astype(str), labels[test], 100)
    auc = {}
    for line in metrics["detectors"]:
        name, n = line["detector"], line["images"]
        if name in frame:
            score = np.array(frame[name].tolist())[test][:, :n].mean(1)
            auc[name, n] = roc_auc_score(labels[test], score)
            assert line["auc"]["value"] == pytest.approx(auc[name, n])
            expected = ev.measure(labels[test], score, weights)
            assert (line["auc"]["low"], line["auc"]["high"]) == expected.values["auc"][1:]
    assert len(auc) == 10
    (capitals,) = [line for line in metrics["detectors"] if line["detector"] == "text: capitals"]
    assert capitals["auc"]["value"] == 1  # on the scored half; on the other it is the wrong way round
    found = {(line["detector"], line["images"]): line for line in metrics["detectors"]}
    summed = found["norm x 2 + cosine x -3", 2]
    norm, cosine = (np.array(frame[name].tolist())[test].mean(1) for name in ("norm", "cosine"))
    assert summed["auc"]["value"] == pytest.approx(roc_auc_score(labels[test], 2 * norm - 3 * cosine))
    for row in metrics["paired"]:
        if row["metric"] == "auc" and row["detector"] in frame:
            n = row["images"]
            assert row["difference"] == pytest.approx(auc[row["detector"], n] - auc["noise_norm", n])
    assert {name: cost["evaluations"] for name, cost in metrics["costs"].items()} == {"way": 100, "way_5": 10}
    (row, *_) = [row for row in table(metrics).to_dict("records") if row["detector"] == "way_5" and row["n"] == 2]
    assert row["UNet"] == "20"


def test_an_interval_leaves_out_a_fortieth_on_either_side():
    labels, scores = np.array([0, 1] * 50), np.random.default_rng(0).normal(size=100)
    weights = ev.family_weights(np.arange(100), labels, 1000)
    metrics = ev.measure(labels, scores, weights)
    inside = [np.mean((metrics.resampled[key] >= low) & (metrics.resampled[key] <= high))
              for key, (_, low, high) in metrics.values.items() if key == "auc"]  # fmt: skip
    assert inside[0] == pytest.approx(0.95, abs=0.005)


@pytest.mark.parametrize("target", [0.01, 0.03, 0.2])
def test_threshold_keeps_its_promise(data, target):
    labels, scores = data
    threshold, realised = ev.threshold_at(labels, scores, target)
    assert realised == (scores[labels == 0] >= threshold).mean() <= target
    assert (scores[labels == 1] >= threshold).mean() == pytest.approx(ev.tpr_at_fpr(labels, scores, target)[0])


def test_fitted_weights_recover_the_optimal_direction():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 4000)
    terms = rng.normal(size=(4000, 2)) * [1.0, 0.1] + labels[:, None] * [1.0, 0.05]
    weights = ev.fit_weights(labels, terms)  # Gaussian classes: weights ~ mean / variance = (1, 5)
    assert weights[0] == 1.0 and weights[1] == pytest.approx(5.0, rel=0.2)


def kinds_run():
    """Positives of kind ``a`` score above every negative, those of ``b`` below; negatives have kinds of their own."""
    rows = [("a", 1, 5.0), ("a", 1, 6.0), ("b", 1, -1.0), ("b", 1, -2.0), ("c", 0, 0.0), ("a", 0, 1.0), ("b", 0, 2.0)]
    frame = pd.DataFrame(rows, columns=["kind", "label", "norm"])
    frame["norm"] = [[value] for value in frame["norm"]]
    return Run(frame.assign(prompt="x", family=range(len(rows))))


def test_by_a_column_measures_its_positives_against_all_negatives():
    metrics = evaluate(kinds_run(), resamples=20, by="kind")
    found = {part["value"]: (part["memorized"], part["detectors"][0]["auc"]["value"])
             for part in metrics["by"]["parts"]}  # fmt: skip
    assert found == {"a": (2, 1.0), "b": (2, 0.0)}
    assert by_table(metrics)[["kind", "memorized"]].drop_duplicates().values.tolist() == [["a", 2], ["b", 2]]
    for column in ("sort", "norm"):  # a score is no column to go by
        with pytest.raises(InputError, match=f"no column '{column}'; they have: kind, label"):
            evaluate(kinds_run(), resamples=20, by=column)


def test_empty_cells_are_no_part():
    parts = list(ev.parts_by([1.0, float("nan"), 2.0, None, 3.0], np.array([1, 1, 1, 1, 0])))
    assert [value for value, _ in parts] == [1.0, 2.0] and parts[1][1].tolist() == [False, False, True, False, True]
    with pytest.raises(ValueError, match="both classes"):
        ev.family_weights(np.array(["a", "b"]), np.array([0, 0]), 5)
