"""mitigate_mem.py and the comparison of mitigations, on the shipped model and a few prompts."""

import json
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import GOLDEN
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file

import mitigate_mem
from memorization.cli.mitigate import marked
from memorization.errors import InputError
from memorization.io.prompts import read_prompts
from memorization.similarity import judge
from memorization.studies import amg, compare_report, mitigation_tradeoff

ROOT = GOLDEN.parent.parent


@pytest.fixture(autouse=True)
def without_sscd(monkeypatch):
    """It is optional, and slow at this size."""
    monkeypatch.setattr(judge, "find_weights", lambda: None)


@pytest.fixture
def fast(tmp_path):
    """One noise, and the shipped calibration taken for it."""
    shipped = (ROOT / "results/detection/testbed-eps/main/calibration.yaml").read_text()
    path = tmp_path / "calibration.yaml"
    path.write_text(shipped.replace("num_images: 4", "num_images: 1"))
    return ("--model", "testbed-eps", "--steps", 4, "--calibration", path)


@pytest.fixture
def prompts(tmp_path):
    """Two memorized captions and one that is not."""
    frame = read_prompts(ROOT / "prompts" / "testbed.csv")
    heavy, ordinary = frame[frame["duplicates"] == 64].head(2), frame[frame["kind"] == "ordinary"].head(1)
    path = tmp_path / "list.csv"
    pd.concat([heavy, ordinary]).to_csv(path, index=False)
    return path


def lines(folder):
    return [json.loads(line) for line in (folder / "mitigations.jsonl").read_text().splitlines()]


def test_flagged_prompts_are_mitigated(run_script, fast, prompts, tmp_path, capsys):
    out = tmp_path / "out"
    run_script(mitigate_mem, *fast, "--prompts", prompts, "--out", out)
    rows = lines(out)
    assert [row["id"] for row in rows] == [0, 1]  # the ordinary one is below the threshold
    for row in rows:
        assert row["score_after"] < row["score_before"] and row["iterations"] > 0
        assert len(row["nl2_before"]) == len(row["clip_after"]) == 1
        assert np.mean(row["nl2_after"]) > np.mean(row["nl2_before"])
    assert len(list((out / "images").glob("*.png"))) == 2 * 2
    assert (out / "contact_sheet.png").stat().st_size > 1000
    assert "anisotropy" in capsys.readouterr().out

    embeds = load_file(out / "embeds" / "0000.safetensors")["prompt_embeds"]
    pipe = StableDiffusionPipeline.from_pretrained(ROOT / "testbed/models/testbed-eps", dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    picture = pipe(prompt_embeds=embeds, negative_prompt_embeds=embeds * 0, num_inference_steps=1).images[0]
    assert picture.size == (64, 64)


def test_a_killed_run_goes_on_to_the_same(run_script, fast, prompts, tmp_path, monkeypatch):
    command = (*fast, "--prompts", prompts, "--all", "--method", "cwr")
    run_script(mitigate_mem, *command, "--batch-size", 2, "--out", tmp_path / "whole")  # two prompts at once
    shutil.copytree(tmp_path / "whole", tmp_path / "killed")
    log = tmp_path / "killed" / "mitigations.jsonl"
    log.write_bytes(log.read_bytes()[:-40])
    files = {path.name: path.read_bytes() for path in (tmp_path / "whole").glob("*/*")}
    for path in (tmp_path / "killed").glob("*/0002*"):
        path.unlink()
    command = (*command, "--batch-size", 2)
    run_script(mitigate_mem, *command, "--out", tmp_path / "killed")
    assert {path.name: path.read_bytes() for path in (tmp_path / "killed").glob("*/*")} == files

    def without_times(folder):
        return [{key: value for key, value in row.items() if not key.startswith("seconds")} for row in lines(folder)]

    assert len(lines(tmp_path / "whole")) == 3 and without_times(tmp_path / "whole") == without_times(
        tmp_path / "killed"
    )
    with pytest.raises(InputError, match="other settings"):
        run_script(mitigate_mem, *command, "--out", tmp_path / "killed", "--strength", 1)


def test_rewriting_shows_what_was_changed():
    assert marked("a red kite", "a blue kite") == "a [-red-] {+blue+} kite"
    assert marked("a red kite", "a kite") == "a [-red-] kite"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--method", "nonsense"), "unknown method nonsense; there are: anisotropy"),
        (("--threshold", "high"), "--threshold: high is no number or auto"),
        (("--num-images", 2), "is for num_images = 1, not 2"),
        (("--strength", 0.3), "no level 0.3 of anisotropy in the calibration"),
        (("--strength", -1), "strength = -1 is no number above 0"),
        (("--set", "speed=1"), "anisotropy has no setting 'speed'; it has: strength, target, lr, iterations"),
        (("--limit", 0), "--limit: 0 is no whole number of at least 1"),
        (("--threshold", "nan"), "--threshold: nan is no number or auto"),
        (("--calibration", "none"), "no calibrated threshold"),
        (("--clip", "missing"), "missing: no folder, and the hub does not give it"),
        (("--dtype", "float16"), "gradients are lost in float16"),
        (("--prompts", "missing.txt"), "no such file"),
        (("--steps", 1), "--steps: 1 is no whole number from 3 to 500"),
    ],
)
def test_bad_input(run_script, fast, prompts, tmp_path, arguments, message):
    with pytest.raises(InputError, match=message):
        run_script(mitigate_mem, *fast, "--prompts", prompts, "--out", tmp_path / "out", *arguments)


def test_starting_anew_leaves_nothing_of_the_old_run(run_script, fast, prompts, tmp_path):
    out = tmp_path / "out"
    run_script(mitigate_mem, *fast, "--prompts", prompts, "--all", "--method", "cwr", "--out", out)
    run_script(mitigate_mem, *fast, "--prompts", prompts, "--all", "--method", "static_transition", "--limit", 1,
               "--out", out, "--overwrite")  # fmt: skip
    assert len(list((out / "images").iterdir())) == 2
    assert not list((out / "embeds").iterdir())  # the embedding is the prompt's own: no remedy to hand out
    assert "score_after" not in lines(out)[0]


def test_nothing_above_the_threshold(run_script, fast, prompts, tmp_path, capsys):
    run_script(mitigate_mem, *fast, "--prompts", prompts, "--threshold", 1e9, "--out", tmp_path / "out")
    assert "nothing to mitigate" in capsys.readouterr().out and not (tmp_path / "out").exists()


def test_comparison(run_script, tmp_path, capsys):
    out = tmp_path / "study"
    common = ("--model", "testbed-eps", "--memorized", 1, "--ordinary", 1, "--steps", 3, "--methods", "gni",
              "--resamples", 100, "--out", out)  # fmt: skip
    run_script(mitigation_tradeoff, *common)
    table = pd.read_csv(out / "table.csv")
    assert table["method"].tolist() == ["none"] + ["gni"] * 5 and table["row"][1] == "gni 0.1"
    assert table["copies"].between(0, 1).all() and (table["copies low"] <= table["copies high"]).all()
    moved = table[table["method"] == "gni"]["ordinary: picture change"].to_numpy()
    assert moved[0] < moved[-1]
    scores = out / "scores.jsonl"
    before = scores.read_bytes()
    scores.write_bytes(before[: len(before) // 2])
    run_script(mitigation_tradeoff, *common)
    assert len(scores.read_text().splitlines()) == 6 * 2 and (out / "tradeoff.png").exists()


def test_equal_alignment_is_read_off_the_curve():
    table = pd.DataFrame({
        "method": ["none", "mild", "mild", "harsh", "harsh", "weak"],
        "clip": [1.0, 0.95, 0.85, 0.8, 0.5, 0.95], "copies": [1.0, 0.6, 0.2, 0.5, 0.0, 0.9],
    })  # fmt: skip
    found = compare_report.at_equal_alignment(table, 0.9).set_index("method").iloc[:, 0]
    assert found.index.tolist() == ["mild", "harsh", "weak"]
    assert found.tolist() == pytest.approx([0.4, 0.75, 0.9])  # the last keeps more, so its own share counts


def test_tables_of_amg(run_script, tmp_path, monkeypatch, capsys):
    out = tmp_path / "study"
    monkeypatch.setattr(amg, "GUIDANCES", ("sim",))
    monkeypatch.setattr(amg, "PERTURBATIONS", ("gni",))
    command = ("--model", "testbed-eps", "--memorized", 1, "--ordinary", 1, "--images", 2, "--steps", 4, "--out", out,
               "--ablated", ROOT / "testbed/models/testbed-v")  # fmt: skip
    run_script(amg, *command)
    rows = pd.read_csv(out / "table.csv").set_index("row")
    assert list(rows.index) == ["none", "gni", "amg main", "amg strong", "sim", *amg.gates("nl2"), "ablation"]
    assert rows.loc["amg main", "nl2 lowest"] > rows.loc["none", "nl2 lowest"]
    assert rows.loc["no gate", "ordinary: picture change"] > rows.loc["amg main", "ordinary: picture change"]
    values = [json.loads(line) for line in (out / "scores.jsonl").read_text().splitlines()]
    assert len(values) == 2 * len(rows) and all(len(line["nl2"]) == 2 for line in values)
    nearest = min(min(line["nl2"]) for line in values if line["row"] == "sim" and line["label"] == 1)
    assert nearest == pytest.approx(rows.loc["sim", "nl2 lowest"], abs=1e-3)
    assert (rows["Frechet"] > 0).all() and capsys.readouterr().out.count("| none ") == 4  # row and method, two tables
    assert (out / "trajectory.png").stat().st_size > 1000 and (out / "sheet.png").stat().st_size > 1000


def test_mitigation_by_amg_makes_its_own_index(run_script, fast, prompts, tmp_path):
    out = tmp_path / "out"
    run_script(mitigate_mem, *fast, "--prompts", prompts, "--method", "amg", "--limit", 1, "--out", out)
    (row,) = lines(out)
    assert np.mean(row["nl2_after"]) > np.mean(row["nl2_before"]) and "score_after" not in row
