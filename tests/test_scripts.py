"""The scripts as a user meets them."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import GOLDEN
from PIL import Image
from safetensors.torch import load_file, save_file

import detect_eval
import detect_mem
from memorization.errors import InputError
from memorization.flags import run_script as run_main
from memorization.io.files import read_lines

ROOT = GOLDEN.parent.parent
TINY = str(GOLDEN / "tiny-eps")
CPU = ("--device", "cpu", "--dtype", "float32")


def detect(run_script, out, prompts, *more, model=TINY):
    run_script(detect_mem, "--model", model, "--prompts", prompts, "--out", out, *CPU, *more)
    return (out / "scores.jsonl").read_bytes()


def test_scores_hold_what_the_contract_says(run_script, prompt_file, tmp_path, capsys):
    detect(run_script, tmp_path / "run", prompt_file, "--num-images", 3)
    rows, _ = read_lines(tmp_path / "run" / "scores.jsonl")
    assert [row["id"] for row in rows] == list(range(20))
    for row in rows:
        assert {"id", "prompt", "label", "family", "anisotropy", "norm", "cosine", "noise_norm"} == set(row)
        assert all(len(row[name]) == 3 for name in ("anisotropy", "norm", "cosine", "noise_norm"))
        assert row["norm"] == row["noise_norm"]
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["status"] == "complete" and record["settings"]["seed"] == 51 and record["seconds"] > 0
    (session,) = record["sessions"]
    assert {"command", "git_commit", "versions", "device", "date"} <= set(session) and session["from"] == 0
    assert "detect_eval.py" in capsys.readouterr().out


def test_scores_depend_on_neither_batch_size_nor_order_nor_number_of_images(run_script, prompt_file, tmp_path):
    lines = prompt_file.read_text().splitlines(keepends=True)
    reverse = tmp_path / "reverse.jsonl"
    reverse.write_text("".join(reversed(lines)))
    detect(run_script, tmp_path / "a", prompt_file, "--num-images", 3, "--batch-size", 7)
    detect(run_script, tmp_path / "b", reverse, "--num-images", 1, "--batch-size", 1)
    left, right = (read_lines(tmp_path / name / "scores.jsonl")[0] for name in "ab")
    for one, other in zip(left, reversed(right), strict=True):
        assert one["prompt"] == other["prompt"]
        for name in ("anisotropy", "norm", "cosine"):
            assert one[name][0] == pytest.approx(other[name][0], rel=2e-5, abs=2e-6)


def test_killed_run_goes_on_to_the_same_bytes(run_script, prompt_file, tmp_path):
    whole = detect(run_script, tmp_path / "whole", prompt_file, "--num-images", 2, "--batch-size", 6)
    arguments = ["--model", TINY, "--prompts", str(prompt_file), "--num-images", "2", "--batch-size", "6", *CPU]
    dying = f"""
import os, signal, sys
from local_sd_pipeline import LocalStableDiffusionPipeline as P
plain, calls = P.trace, []
def trace(*a, **k):
    calls.append(1)
    if len(calls) == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    return plain(*a, **k)
P.trace = trace
import detect_mem
sys.argv = ["detect_mem.py", *{[*arguments, "--out", str(tmp_path / "killed")]!r}]
detect_mem.main()
"""
    died = subprocess.run([sys.executable, "-c", dying], cwd=ROOT, capture_output=True, env={**os.environ})
    assert died.returncode == -9
    partial = (tmp_path / "killed" / "scores.jsonl").read_bytes()
    assert partial == b"".join(whole.splitlines(keepends=True)[:9])  # three batches of three prompts
    (tmp_path / "killed" / "scores.jsonl").write_bytes(partial + b'{"id": 9, "pro')  # and a torn line
    assert detect(run_script, tmp_path / "killed", prompt_file, "--num-images", 2, "--batch-size", 6) == whole


def test_resuming_in_the_middle_of_a_batch_gives_the_same_bytes(run_script, prompt_file, tmp_path, monkeypatch):
    arguments = (tmp_path / "run", prompt_file, "--batch-size", 8)
    whole = detect(run_script, *arguments)
    (tmp_path / "run" / "scores.jsonl").write_bytes(b"".join(whole.splitlines(keepends=True)[:13]))
    rows = []
    plain = torch.nn.Module.__call__

    def counted(module, *a, **k):
        if type(module).__name__ == "UNet2DConditionModel":
            rows.append(len(a[0]))
        return plain(module, *a, **k)

    monkeypatch.setattr(torch.nn.Module, "__call__", counted)
    assert detect(run_script, *arguments) == whole
    assert rows == [1, 1, 8, 8, 4, 4]  # unconditional at two timesteps; prompts 8 to 15 again; 16 to 19


def test_changed_settings_are_refused(run_script, prompt_file, tmp_path):
    detect(run_script, tmp_path / "run", prompt_file)
    with pytest.raises(InputError, match="seed: 51 there, 53 asked"):
        detect(run_script, tmp_path / "run", prompt_file, "--seed", 53)
    prompt_file.write_text(prompt_file.read_text() + '{"prompt": "one more", "label": 0, "family": "x"}\n')
    with pytest.raises(InputError, match="prompts:"):
        detect(run_script, tmp_path / "run", prompt_file)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model", TINY, "--prompts", "nowhere.txt"], "nowhere.txt: no such file"),
        (["--model", TINY], "give --prompts"),
        (["--model", "no-such-model", "--prompts", "LIST"], "no-such-model.*testbed-eps"),
        (["--model", str(GOLDEN), "--prompts", "LIST"], "no model_index.json"),
        (["--model", TINY, "--prompts", "LIST", "--detectors", "magic"], "unknown detector magic"),
        (["--model", TINY, "--prompts", "LIST", "--num-images", "0"], "at least 1"),
        (["--model", TINY, "--prompts", "LIST", "--steps", "600"], "from 3 to 500"),
        (["--model", TINY, "--prompts", "LIST", "--seed", "-1"], "--seed: -1 is no whole number from 0"),
        (["--model", TINY, "--prompts", "LIST", "--batch-size", "many"], "whole number"),
        (["--model", TINY, "--prompts", "LIST", "--device", "warp"], "device 'warp'"),
        (["--model", TINY, "--images", "FOLDER", "--noises", "4"], "--images goes without --noises"),
        (["--model", TINY, "--images", "FOLDER", "--guidance-scale", "2"], "--images goes without .*--guidance-scale"),
        (["--model", TINY, "--memorized", "LIST"], "--non-memorized"),
        (["--model", TINY, "--prompts", "LIST", "--calibration", "LIST"], "not a calibration file"),
        (["--prompts", "LIST"], "--model"),
        (["--model", TINY, "--prompts", "LIST", "--seed", "x"], "x is no whole number"),
    ],
)
def test_bad_input_is_one_clear_line(run_script, prompt_file, arguments, said):
    with pytest.raises(InputError, match=said) as caught:
        run_script(detect_mem, *[str(prompt_file) if a == "LIST" else a for a in arguments])
    assert "\n" not in str(caught.value)


BAD_COMMANDS = [  # what a user types, and what is said of it
    (["detect_mem.py", "--model", "testbed-eps", "--prompts", "none.txt"], "none.txt: no such file"),
    (["mitigate_mem.py", "--model", "no/such/folder", "--all", "--method", "cwr", "--prompts", "prompts/testbed.csv"],
     "no/such/folder: no such folder"),
]  # fmt: skip
STUDY = ["memorization.studies.timestep_sweep", "--model", "no/such/folder", "--prompts", "prompts/testbed.csv"]


@pytest.mark.parametrize("commands", [BAD_COMMANDS, [(STUDY, "no/such/folder: no such folder")]])
def test_bad_input_ends_with_status_2_and_one_line_of_ours(commands):
    """In a new process, so that what a library says as it is imported shows; a study is quiet by another way."""
    program = f"""
import runpy, sys
for name, *arguments in {[command for command, _ in commands]!r}:
    sys.argv = [name, *arguments]
    try:
        (runpy.run_path if name.endswith(".py") else runpy.run_module)(name, run_name="__main__")
    except SystemExit as ended:
        print(ended.code)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == "2\n" * len(commands), done.stderr
    assert done.stderr.count("\n") == len(commands), done.stderr
    for line, (_, said) in zip(done.stderr.splitlines(), commands, strict=True):
        assert line.startswith(f"error: {said}")


def test_a_bug_is_one_line_and_its_traceback_a_file(capsys):
    def broken():
        raise ZeroDivisionError("by nothing")

    with pytest.raises(SystemExit) as ended:
        run_main(broken)
    line = capsys.readouterr().err
    assert ended.value.code == 1 and line.count("\n") == 1 and "ZeroDivisionError: by nothing" in line
    path = Path(line.split("traceback is in ")[1].rstrip(")\n"))
    assert "in broken" in path.read_text()
    path.unlink()


def test_nan_names_the_prompt(run_script, prompt_file, tmp_path, monkeypatch):
    from local_sd_pipeline import LocalStableDiffusionPipeline as Pipeline

    plain = Pipeline.predict_noise

    def broken(self, latents, timestep, embeds):
        return torch.where(
            torch.arange(len(latents))[:, None, None, None] == 2, torch.nan, plain(self, latents, timestep, embeds)
        )

    monkeypatch.setattr(Pipeline, "predict_noise", broken)
    with pytest.raises(InputError, match=r"NaN .*' 0'"):
        detect(run_script, tmp_path / "run", prompt_file, "--batch-size", 4)


def test_batch_is_halved_on_out_of_memory(run_script, prompt_file, tmp_path, monkeypatch):
    from local_sd_pipeline import LocalStableDiffusionPipeline as Pipeline

    plain, sizes = Pipeline.predict_noise, []

    def greedy(self, latents, timestep, embeds):
        sizes.append(len(latents))
        if len(latents) > 4:
            raise RuntimeError("CUDA out of memory. Tried to allocate")
        return plain(self, latents, timestep, embeds)

    expected = detect(run_script, tmp_path / "small", prompt_file, "--batch-size", 4)
    monkeypatch.setattr(Pipeline, "predict_noise", greedy)
    assert detect(run_script, tmp_path / "run", prompt_file, "--batch-size", 16) == expected
    assert sorted({size for size in sizes if size > 1}, reverse=True) == [16, 8, 4]
    assert json.loads((tmp_path / "run" / "run.json").read_text())["batch_size_used"] == 4


def test_long_and_duplicated_prompts_are_counted(run_script, tmp_path, capsys):
    path = tmp_path / "list.txt"
    path.write_text("word " * 200 + "\nkite\n\nkite\n")
    detect(run_script, tmp_path / "run", path)
    said = capsys.readouterr()
    assert (
        "1 blank lines skipped" in said.err
        and "1 duplicated prompts" in said.err
        and "1 prompts over 77 tokens" in said.err
    )
    assert "Highest anisotropy of 3 prompts" in said.out and "detect_eval" not in said.out


def test_evaluation_prints_the_table_and_writes_the_numbers(run_script, prompt_file, tmp_path, capsys):
    out = tmp_path / "run"
    detect(run_script, out, prompt_file, "--num-images", 2)
    capsys.readouterr()
    run_script(detect_eval, out, "--resamples", 200)
    table, warned = capsys.readouterr()
    assert "2 families of near-copies only" in warned
    for name in ("anisotropy", "norm", "cosine", "noise_norm", "text: capitals", "text: naive Bayes"):
        assert f"| {name} " in table
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["counts"]["memorized"] == 10 and metrics["counts"]["families"] == 2
    norm = {row["images"]: row for row in metrics["detectors"] if row["detector"] == "norm"}
    assert set(norm) == {1, 2} and norm[1]["auc"]["low"] <= norm[1]["auc"]["value"] <= norm[1]["auc"]["high"]
    for picture in ("roc", "distributions", "norm_cosine"):
        assert (out / f"{picture}.png").stat().st_size > 5000
    run_script(detect_eval, out, "--resamples", 200, "--format", "json", "--no-plots")
    assert json.loads(capsys.readouterr().out) == [metrics]
    run_script(detect_eval, out, "--resamples", 200, "--format", "csv", "--no-plots")
    assert capsys.readouterr().out.startswith("detector,n,AUC")


def test_calibration_comes_from_validation_rows_and_is_read_again(run_script, tmp_path, capsys):
    rows = [
        {"prompt": f"thing number {i}", "label": i % 2, "family": f"f{i}", "split": "validation" if i < 20 else "test"}
        for i in range(40)
    ]
    path = tmp_path / "list.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    detect(run_script, tmp_path / "run", path)
    run_script(detect_eval, tmp_path / "run", "--calibrate", tmp_path / "c.yaml", "--fpr", "0.1")
    with pytest.raises(InputError, match="is for num_images = 1, not 2"):
        detect(run_script, tmp_path / "x", path, "--calibration", tmp_path / "c.yaml", "--num-images", 2)
    with pytest.raises(InputError, match="is for variant = official, not eps"):
        detect(run_script, tmp_path / "x", path, "--calibration", tmp_path / "c.yaml", "--variant", "eps")
    calibration = yaml.safe_load((tmp_path / "c.yaml").read_text())
    assert calibration["negatives"] == calibration["positives"] == 10
    threshold = calibration["detectors"]["noise_norm"]["threshold"]
    scored, _ = read_lines(tmp_path / "run" / "scores.jsonl")
    false_alarms = [row for row in scored[:20] if row["label"] == 0 and row["noise_norm"][0] >= threshold]
    assert len(false_alarms) <= 1
    capsys.readouterr()
    detect(run_script, tmp_path / "again", path, "--calibration", tmp_path / "c.yaml")
    again, _ = read_lines(tmp_path / "again" / "scores.jsonl")
    weight = calibration["detectors"]["anisotropy"]["settings"]["cosine_weight"]
    sign = calibration["detectors"]["anisotropy"]["settings"]["norm_weight"]
    for row in again:
        expected = sign * row["norm"][0] + weight * row["cosine"][0]
        assert row["anisotropy"][0] == pytest.approx(expected, rel=1e-4, abs=1e-4)
    assert "prompts are flagged" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"prompt": "a"}], "no labels"),
        ([{"prompt": "a", "label": 1, "family": "f"}], "one class only"),
    ],
)
def test_evaluation_needs_labels_of_both_classes(run_script, tmp_path, rows, said):
    path = tmp_path / "list.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    detect(run_script, tmp_path / "run", path)
    with pytest.raises(InputError, match=said):
        run_script(detect_eval, tmp_path / "run")


def test_a_finished_run_is_left_as_it_is(run_script, prompt_file, tmp_path):
    detect(run_script, tmp_path / "run", prompt_file)
    before = (tmp_path / "run" / "run.json").read_bytes()
    detect(run_script, tmp_path / "run", prompt_file)
    assert (tmp_path / "run" / "run.json").read_bytes() == before


def test_a_changed_checkpoint_is_another_run(run_script, prompt_file, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(TINY, model)
    detect(run_script, tmp_path / "run", prompt_file, model=model)
    weights = load_file(model / "unet" / "diffusion_pytorch_model.safetensors")
    save_file(
        {name: value * 1.01 for name, value in weights.items()}, model / "unet" / "diffusion_pytorch_model.safetensors"
    )
    with pytest.raises(InputError, match=r"revision\.unet: sha256"):
        detect(run_script, tmp_path / "run", prompt_file, model=model)


@pytest.mark.parametrize(
    ("part", "change", "said"),
    [
        ("scheduler/scheduler_config.json", {"prediction_type": "flow"}, "predicts 'flow'"),
        ("unet/config.json", {"class_embed_type": "timestep"}, "lacks the weight class_embedding"),
        ("model_index.json", {"unet": [None, None]}, "is no UNet2DConditionModel"),
    ],
)
def test_checkpoints_without_what_is_needed(run_script, prompt_file, tmp_path, part, change, said):
    model = tmp_path / "model"
    shutil.copytree(TINY, model)
    config = json.loads((model / part).read_text())
    (model / part).write_text(json.dumps({**config, **change}))
    with pytest.raises(InputError, match=said):
        detect(run_script, tmp_path / "run", prompt_file, model=model)


def test_pickled_weights_are_refused(run_script, prompt_file, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(TINY, model)
    weights = model / "unet" / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(weights), weights.with_suffix(".bin"))
    weights.unlink()
    with pytest.raises(InputError, match="safetensors"):
        detect(run_script, tmp_path / "run", prompt_file, model=model)


def test_evaluation_without_names_skips_what_has_no_labels(run_script, prompt_file, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("memorization.cli.eval.ROOT", tmp_path)
    plain = tmp_path / "plain.txt"
    plain.write_text("one\ntwo\n")
    detect(run_script, tmp_path / "results" / "unlabelled", plain)
    detect(run_script, tmp_path / "results" / "deep" / "labelled", prompt_file)
    capsys.readouterr()
    run_script(detect_eval, "--resamples", 100, "--no-plots")
    said = capsys.readouterr()
    assert "left out" in said.err and "unlabelled" in said.err and ", labelled: " in said.out


def test_evaluation_of_nothing(run_script, tmp_path):
    with pytest.raises(InputError, match="holds no run"):
        run_script(detect_eval, tmp_path)


def test_all_detectors_their_costs_and_what_is_learned(run_script, tmp_path, capsys):
    rows = [
        {"prompt": f"thing {i}", "label": i % 2, "family": f"f{i}", "split": "validation" if i < 6 else "test"}
        for i in range(12)
    ]
    path = tmp_path / "list.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    detect(run_script, tmp_path / "run", path, "--detectors", "all", "--steps", 11, "--measure-costs", "--explain",
           "--set", "p_laplace.points=4")  # fmt: skip
    out = capsys.readouterr().out
    assert "tokens that trigger them" in out and (tmp_path / "run" / "tokens.png").stat().st_size > 1000
    run_script(detect_eval, tmp_path / "run", "--resamples", 100, "--no-plots")
    table = capsys.readouterr().out
    for name in ("anisotropy", "sharpness", "trajectory_norm_5", "bright_ending", "attention_entropy",
                 "p_laplace_prompt", "trajectory_z", "learned: one trace", "text: capitals"):  # fmt: skip
        assert f"| {name} " in table
    costs = json.loads((tmp_path / "run" / "costs.json").read_text())
    evaluations = {name: cost["evaluations"] for name, cost in costs.items()}
    assert evaluations["trajectory_norm"] == 22 and evaluations["p_laplace"] == 22 + 2 * 4
    with pytest.raises(InputError, match="fused reads step 10 of the grid: give more --steps"):
        detect(run_script, tmp_path / "short", path, "--detectors", "fused", "--steps", 5)


def test_pictures_are_scored(run_script, tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(5):
        Image.fromarray(np.random.default_rng(i).integers(255, size=(40, 50, 3), dtype=np.uint8)).save(
            folder / f"{i}.png"
        )
    whole = ("--model", TINY, "--images", folder, "--out", tmp_path / "run", *CPU)
    few = ("--set", "p_laplace.points=4")
    run_script(detect_mem, *whole, *few)
    rows, _ = read_lines(tmp_path / "run" / "scores.jsonl")
    assert [row["image"] for row in rows] == [f"{i}.png" for i in range(5)]
    assert all(row["p_laplace"] == row["p_laplace_prompt"] for row in rows)  # no prompt was given
    complete = (tmp_path / "run" / "scores.jsonl").read_bytes()
    (tmp_path / "run" / "scores.jsonl").write_bytes(complete[: len(complete) // 2])
    run_script(detect_mem, *whole, *few)
    assert (tmp_path / "run" / "scores.jsonl").read_bytes() == complete
    (folder / "metadata.jsonl").write_text('{"file_name": "0.png", "prompt": "a kite"}\n')
    with pytest.raises(InputError, match=r"says nothing of 1\.png"):
        run_script(detect_mem, *whole)
    with pytest.raises(InputError, match="anisotropy: scores prompts, not pictures"):
        run_script(detect_mem, *whole, "--detectors", "anisotropy")
    (folder / "1.png").write_bytes(b"no picture")
    (folder / "metadata.jsonl").unlink()
    with pytest.raises(InputError, match=r"1\.png: no picture that can be read"):
        run_script(detect_mem, *whole, "--overwrite")


def test_sequential_scoring_spends_noises_on_the_undecided(run_script, tmp_path):
    rows = [{"prompt": f"thing number {i}", "label": i % 2, "family": f"f{i}"} for i in range(24)]
    path = tmp_path / "list.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(InputError, match="needs --calibration"):
        detect(run_script, tmp_path / "x", path, "--sequential")
    detect(run_script, tmp_path / "run", path, "--num-images", 8)
    run_script(detect_eval, tmp_path / "run", "--calibrate", tmp_path / "c.yaml", "--fpr", "0.3")
    detect(run_script, tmp_path / "seq", path, "--sequential", "--calibration", tmp_path / "c.yaml")
    whole, few = (read_lines(tmp_path / name / "scores.jsonl")[0] for name in ("run", "seq"))
    used = [len(row["noise_norm"]) for row in few]
    assert set(used) <= {1, 2, 4, 8} and len(set(used)) > 1
    for row, full in zip(few, whole, strict=True):
        assert row["norm"] == pytest.approx(full["norm"][: len(row["norm"])], rel=1e-4)
