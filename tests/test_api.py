"""The package as a library."""

import numpy as np
import pandas as pd
import pytest
from conftest import GOLDEN

import memorization as mem
from memorization.io.files import read_lines


@pytest.fixture(scope="module")
def model():
    return mem.load(GOLDEN / "tiny-eps", device="cpu", dtype="float32")


@pytest.fixture
def prompts():
    """A labelled list."""
    rows = [{"prompt": f"thing number {i}", "label": i % 2, "family": f"f{i}"} for i in range(12)]
    return pd.DataFrame(rows)


def test_scores_are_those_of_the_command(model, prompts, tmp_path, monkeypatch, run_script):
    import detect_mem

    monkeypatch.chdir(tmp_path)
    frame = mem.score(model, prompts, detectors=["anisotropy"], noises=2, settings={"anisotropy": {"cosine_weight": 2}})
    assert not list(tmp_path.iterdir())  # nothing is written
    prompts.to_csv("list.csv", index=False)
    run_script(detect_mem, "--model", GOLDEN / "tiny-eps", "--prompts", "list.csv", "--detectors", "anisotropy",
               "--num-images", 2, "--set", "anisotropy.cosine_weight=2", "--device", "cpu", "--dtype", "float32",
               "--out", "run")  # fmt: skip
    assert frame.to_dict("records") == read_lines(tmp_path / "run" / "scores.jsonl")[0]
    again = mem.score(model, "list.csv", detectors=["anisotropy"], noises=2, out="mine")
    assert (tmp_path / "mine" / "scores.jsonl").is_file() and again["norm"].tolist() == frame["norm"].tolist()


def test_evaluation_of_a_frame_and_of_a_folder(model, prompts, tmp_path):
    frame = mem.score(model, prompts, noises=2, out=tmp_path / "run")
    table = mem.evaluate(frame, resamples=100)
    assert table.equals(mem.evaluate(tmp_path / "run", resamples=100))
    frame.attrs = {}  # as where a frame comes from somewhere else
    assert mem.evaluate(frame, resamples=100).equals(table)
    norm = table[(table["detector"] == "norm") & (table["noises"] == 2)].iloc[0]
    assert norm["auc low"] <= norm["auc"] <= norm["auc high"]
    with pytest.raises(mem.InputError, match="no labels"):
        mem.evaluate(mem.score(model, ["one", "two"]))


def test_mitigation_gives_pictures_and_tensors(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = {"noises": 2, "steps": 3, "clip": "none", "settings": {"target": 0.5, "iterations": 2}}
    result = mem.mitigate(model, ["a red kite", "two boats"], "sail", **options)
    assert not list(tmp_path.iterdir())
    assert result.before.shape == result.after.shape == (2, 2, 32, 32, 3) and result.before.dtype == np.uint8
    assert (result.before != result.after).any() and set(result.tensors[0]) == {"latents"}
    assert result.frame["score_after"].mean() < result.frame["score_before"].mean()
    kept = mem.mitigate(model, ["a red kite", "two boats"], "sail", **options, out="run")
    assert (kept.after == result.after).all() and (tmp_path / "run" / "images").is_dir()


def test_a_yaml_file_of_ones_own(model, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(
        f"ids: ['{GOLDEN / 'tiny-eps'}']\ndtype: float32\nsettings: {{detectors: {{anisotropy: {{norm_weight: 3}}}}}}\n"
    )
    mine, plain = (mem.score(m, ["a kite"], detectors=["anisotropy"]) for m in (mem.load(path, device="cpu"), model))
    assert mine["norm"].tolist() == plain["norm"].tolist() and mine["anisotropy"][0] != plain["anisotropy"][0]


def test_what_makes_no_sense_is_said(model):
    for call, said in (
        (lambda: mem.load("no-such-model"), "no-such-model"),
        (lambda: mem.load("nowhere/at/all"), "nowhere/at/all: no such folder"),
        (lambda: mem.score(model, []), "at least one prompt"),
        (lambda: mem.score(model, ["a"], noises=0), "noises = 0 is no whole number of at least 1"),
        (lambda: mem.score(model, ["a"], step=3), "scoring has no setting 'step'"),
        (lambda: mem.score(model, ["a"], detectors=["magic"]), "unknown detector magic"),
        (lambda: mem.score(model, ["a"], settings={"p_laplace": {"points": 3}}), "p_laplace, which is not among"),
        (lambda: mem.score(model, ["a"], sequential=True), "there are no bands for anisotropy"),
        (lambda: mem.mitigate(model, ["a"], "sail"), r"no level 0\.5 of noise_norm"),
        (lambda: mem.mitigate(model, ["a"], "cwr", threshold=1e9), "nothing to mitigate"),
        (lambda: mem.mitigate(model, ["a"], "cwr", index="x"), "--index is for amg, not cwr"),
    ):
        with pytest.raises(mem.InputError, match=said):
            call()
    with pytest.raises(AttributeError, match="no attribute 'magic'"):
        _ = mem.magic
    assert {"load", "score", "evaluate", "mitigate", "register_detector"} <= set(dir(mem))
