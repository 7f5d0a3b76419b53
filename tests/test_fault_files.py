"""Faults in files: what is written whole or not at all, what is damaged, and what is no file."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from conftest import GOLDEN
from faults import NAMES, ODD, damaged, examples, full_disk, make_odd, refused, taken_or_refused, within
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from memorization.cli import eval as eval_command
from memorization.evaluation.report import evaluate
from memorization.evaluation.runs import read_run
from memorization.io.figures import plt, save_figure
from memorization.io.files import LineFile, read_json, read_lines, write_atomically
from memorization.io.pictures import list_pictures, read_picture
from memorization.io.prompts import read_prompts
from memorization.io.published import fetch
from memorization.runs import store as store_module
from memorization.runs.detect import run_detection
from memorization.runs.store import ResultStore

ROOT = GOLDEN.parent.parent


@pytest.mark.parametrize("kind", ["pipe", "folder", "device", "loop"])
def test_what_is_no_regular_file_is_not_replaced(tmp_path, kind):
    path = make_odd(tmp_path / "out", kind)
    before = os.lstat(path)
    refused(lambda: write_atomically(path, "text"), str(path))
    assert os.lstat(path).st_ino == before.st_ino and sorted(p.name for p in tmp_path.iterdir()) == ["out"]


@pytest.mark.parametrize("there", [True, False])
def test_links_are_followed(tmp_path, there):
    (tmp_path / "deep").mkdir()
    target = tmp_path / "deep" / "target"
    if there:
        target.write_text("old")
    link = tmp_path / "link"
    link.symlink_to(target)
    write_atomically(link, "new")
    assert link.is_symlink() and target.read_text() == "new" and not list(tmp_path.rglob("*.part"))


def test_a_planted_part_is_no_way_to_other_files(tmp_path):
    (tmp_path / "other").write_text("mine")
    (tmp_path / "out.part").symlink_to(tmp_path / "other")
    write_atomically(tmp_path / "out", "new")
    assert (tmp_path / "other").read_text() == "mine" and not (tmp_path / "out").is_symlink()


@pytest.mark.parametrize("name", ["nu\0ll", "b" * 300, "missing/out"])
def test_names_that_cannot_be_written(tmp_path, name):
    refused(lambda: write_atomically(tmp_path / name, "text"), "cannot be written")


def figure(path):
    made, axis = plt.subplots()
    axis.plot([0, 1])
    return save_figure(made, path)


def picture(path):
    from memorization.io.pictures import save_picture

    save_picture(np.random.default_rng(0).integers(255, size=(64, 64, 3), dtype=np.uint8), path)


def tensors(path):
    import torch

    from memorization.runs.kept import KeptInFolder

    kept = KeptInFolder(path.parent)
    kept.start(anew=False)
    kept.add(0, {"before": np.random.default_rng(0).integers(255, size=(1, 64, 64, 3), dtype=np.uint8)},
             {"latents": torch.zeros(10_000)})  # fmt: skip


def line_file(path):
    with LineFile(path, "busy") as lines:
        lines.append([{"a": "x" * 5000}])


def whole_run(path):
    with ResultStore(path, {"a": 1}, {}) as store:
        store.start()
        store.append([{"id": 0, "prompt": "x" * 5000}])


def published(path):
    mirror = path.parent / "mirror"
    mirror.mkdir()
    for name in ("sd1_mem.txt",):
        (mirror / name).write_bytes(b"x" * 3000)
    return mirror


WRITERS = {
    "text": lambda path: write_atomically(path, "x" * 5000),
    "bytes": lambda path: write_atomically(path, b"x" * 5000),
    "figure": lambda path: figure(path.with_suffix(".png")),
    "picture": picture,
    "tensors": tensors,
    "lines": line_file,
    "run": whole_run,
}


@pytest.mark.parametrize("size", [0, 100])
@pytest.mark.parametrize("name", list(WRITERS))
def test_a_full_disk_is_one_line_and_leaves_no_part(tmp_path, name, size):
    plt.figure()  # whatever matplotlib writes for itself is written now
    with full_disk(size):
        refused(lambda: WRITERS[name](tmp_path / "out"), "cannot be written")
    assert not list(tmp_path.rglob("*.part"))


def test_fetch_on_a_full_disk(tmp_path, monkeypatch):
    import hashlib

    from memorization.io import published as module

    mirror = published(tmp_path / "out")
    sha = hashlib.sha256(b"x" * 3000).hexdigest()
    monkeypatch.setattr(module, "PUBLISHED", {"sd1_mem.txt": ("a/b", sha)})
    with full_disk(100):
        refused(lambda: fetch(tmp_path / "out", str(mirror)), "cannot be written")
    assert not list((tmp_path / "out").iterdir())


# A run of eight prompts.
SETTINGS = {
    "model": "m",
    "num_images": 2,
    "steps": 50,
    "seed": 51,
    "detectors": {"noise_norm": {"terms": ["noise_norm"]}},
}
RECORD = {"status": "complete", "seconds": 1.5, "settings": SETTINGS, "sessions": [{"from": 0}], "lines": 8}
COSTS = {"noise_norm": {"needs": "prompt", "evaluations": 1.0, "seconds": 0.5}}


def rows(count=8):
    return [{"id": i, "prompt": f"thing {i}", "label": i % 2, "family": f"f{i // 2}",
             "noise_norm": [0.1 * i, 0.2 * i + 0.5]} for i in range(count)]  # fmt: skip


def write_run(folder, record=RECORD, lines=None, costs=COSTS):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.json").write_text(json.dumps(record, ensure_ascii=True))
    (folder / "scores.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines or rows()))
    (folder / "costs.json").write_text(json.dumps(costs))
    return folder


def test_the_run_of_these_tests_is_whole(tmp_path):
    assert evaluate(read_run(write_run(tmp_path)), 100)["counts"]["memorized"] == 4


RECORD_DAMAGES = [
    *[({}, "status")], *[({key: value for key, value in RECORD.items() if key != name}, name)
                         for name in ("status", "seconds", "settings")],
    *[({**RECORD, "settings": {key: value for key, value in SETTINGS.items() if key != name}}, name)
      for name in ("model", "num_images", "steps")],
    *[({**RECORD, name: value}, name) for name, value in [
        ("status", "done"), ("status", 1), ("seconds", "long"), ("seconds", None), ("settings", []), ("settings", "x"),
        ("sessions", {}), ("sessions", [1]), ("lines", -1), ("lines", "8"), ("lines", True), ("lines", 7),
        ("lines", 9)]],
    *[({**RECORD, "settings": {**SETTINGS, name: value}}, name) for name, value in [
        ("num_images", 0), ("num_images", True), ("num_images", "two"), ("num_images", 3), ("num_images", 1),
        ("steps", 1), ("steps", None), ("steps", True), ("model", 3), ("detectors", []), ("detectors", {"a": 1}),
        ("detectors", {"a": {}}), ("detectors", {"a": {"terms": "a"}}), ("detectors", {"a": {"terms": [1]}}),
        ("detectors", {"a": {"terms": ["a"]}})]],
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(RECORD_DAMAGES)))
def test_a_damaged_run_json(tmp_path, number):
    record, field = RECORD_DAMAGES[number]
    if field == "detectors" or record.get("settings", {}) in ({**SETTINGS, "num_images": n} for n in (1, 3)):
        field = ""  # what it says of the scores is wrong
    refused(lambda: read_run(write_run(tmp_path, record)), str(tmp_path), field)


SCORE_DAMAGES = [
    *[("noise_norm", value) for value in [
        True, [True, 1.0], [1.0], [1.0, 2.0, 3.0], [], None, "high", ["1", "2"], [None, 1.0], [float("nan"), 1.0],
        [float("inf"), 1.0], [[1.0], [2.0]], {"a": 1}, 1.0, [10**400, 1.0]]],
    *[("label", value) for value in [True, 2, -1, "1", None, 0.5, [1]]],
    *[("id", value) for value in [True, 5, "3", None, 3.5]],
]  # fmt: skip


@pytest.mark.parametrize(("field", "value"), SCORE_DAMAGES, ids=range(len(SCORE_DAMAGES)))
def test_damaged_scores(tmp_path, field, value):
    lines = rows()
    lines[3][field] = value
    refused(lambda: read_run(write_run(tmp_path, lines=lines)), str(tmp_path), field)


@pytest.mark.parametrize("field", ["noise_norm", "label", "family", "id"])
def test_scores_that_lack_a_field(tmp_path, field):
    lines = [{key: value for key, value in row.items() if key != field} for row in rows()]
    refused(lambda: read_run(write_run(tmp_path, lines=lines)), str(tmp_path), field)


@pytest.mark.parametrize("cost", [3, [], {}, {"needs": "prompt"}, {**COSTS["noise_norm"], "seconds": None},
                                  {**COSTS["noise_norm"], "evaluations": "two"},
                                  {**COSTS["noise_norm"], "seconds": True}])  # fmt: skip
def test_damaged_costs(tmp_path, cost):
    refused(lambda: read_run(write_run(tmp_path, costs={"noise_norm": cost})), "costs.json", "noise_norm")


@pytest.mark.parametrize("name", ["run.json", "scores.jsonl", "costs.json"])
@pytest.mark.parametrize(
    "content", [b"", b"[]", b"3", b'"x"', b"null", b"\xff\xfe\x00", b"[" * 100_000, b'{"a": ' * 100_000, b"{}"]
)
def test_other_contents(tmp_path, name, content):
    folder = write_run(tmp_path)
    (folder / name).write_bytes(content + b"\n")
    if (name, content) in (("costs.json", b"{}"),):
        return
    refused(lambda: read_run(folder), str(tmp_path))


@pytest.mark.parametrize("name", ["run.json", "scores.jsonl", "costs.json"])
@pytest.mark.parametrize("kind", ODD)
def test_files_of_a_run_that_are_none(tmp_path, name, kind):
    folder = write_run(tmp_path)
    (folder / name).unlink()
    make_odd(folder / name, kind)
    with within(10):
        refused(lambda: read_run(folder), str(tmp_path))


@pytest.mark.parametrize("kind", ODD)
def test_lists_that_are_no_file(tmp_path, kind):
    with within(10):
        refused(lambda: read_prompts(make_odd(tmp_path / "a.txt", kind)), "a.txt")


@pytest.mark.parametrize("kind", ODD)
def test_pictures_that_are_no_file(tmp_path, kind):
    with within(10):
        refused(lambda: read_picture(make_odd(tmp_path / "a.png", kind), None), "a.png")


@pytest.mark.parametrize("kind", ["pipe", "folder", "loop", "device"])
def test_runs_into_what_is_no_file(tmp_path, kind):
    make_odd(tmp_path / "scores.jsonl", kind)
    with within(10):
        refused(lambda: ResultStore(tmp_path, {}, {}, overwrite=True), str(tmp_path))


@examples(250)
@given(data=st.data(), name=st.sampled_from(["run.json", "scores.jsonl", "costs.json"]))
def test_a_damaged_run_is_read_or_refused(tmp_path_factory, data, name):
    folder = write_run(tmp_path_factory.getbasetemp() / "damaged")
    (folder / name).write_bytes(damaged(data, (folder / name).read_bytes()))
    taken_or_refused(lambda: read_run(folder))


@examples(100)
@given(data=st.data())
def test_a_damaged_run_is_gone_on_with_or_refused(tmp_path_factory, data):
    folder = write_run(tmp_path_factory.getbasetemp() / "resumed")
    name = data.draw(st.sampled_from(["run.json", "scores.jsonl"]))
    (folder / name).write_bytes(damaged(data, (folder / name).read_bytes()))
    before = (folder / "scores.jsonl").read_bytes()

    def resume():
        with ResultStore(folder, SETTINGS, {}) as store:
            return store.done

    done = taken_or_refused(resume)
    after = (folder / "scores.jsonl").read_bytes()
    assert before.startswith(after) and (after == before if done is None else len(after.splitlines()) >= done)


def test_more_lines_than_prompts(tmp_path):
    import pandas as pd

    folder = write_run(tmp_path)
    with ResultStore(folder, SETTINGS, {}) as store:
        frame = pd.DataFrame(rows(7))
        refused(lambda: run_detection(None, frame, store, batch_size=1), "8 lines", "7 prompts")


def test_one_bad_run_below_results_is_skipped(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(eval_command, "ROOT", tmp_path)
    write_run(tmp_path / "results" / "good")
    for name, content in (("empty", "{}"), ("none", "null"), ("cut", '{"status"')):
        (tmp_path / "results" / name).mkdir()
        (tmp_path / "results" / name / "run.json").write_text(content)
    eval_command.main(["--resamples", "100", "--no-plots"])
    out, err = capsys.readouterr()
    assert ", good: 4 memorized" in out and err.count("left out: ") == 3


@pytest.mark.parametrize("name", NAMES)
def test_run_folders_of_odd_names(tmp_path, name, capsys):
    folder = tmp_path / name
    made = taken_or_refused(lambda: store_of(folder))
    if made is None:
        assert len(name) > 255 or "\0" in name
        return
    write_run(folder)
    eval_command.main([str(folder), "--resamples", "100"])
    out, err = capsys.readouterr()
    assert (folder / "roc.png").stat().st_size > 5000 and "\x1b" not in out + err


def store_of(folder):
    with ResultStore(folder, SETTINGS, {"command": [str(folder)]}) as store:
        store.start()
        store.append([{"id": 0, "prompt": "x", "image": folder.name}])
    assert read_json(folder / "run.json")["status"] == "complete"
    return read_lines(folder / "scores.jsonl")[0]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("suffix", [".txt", ".csv", ".png"])
def test_lists_and_pictures_of_odd_names(tmp_path, name, suffix):
    path = tmp_path / f"{name}{suffix}"
    content = b"prompt\none\n"
    if suffix == ".png":
        taken_or_refused(lambda: Image.new("RGB", (4, 4)).save(path) if len(name) < 255 and "\0" not in name else None)
        read = lambda: read_picture(path, None)  # noqa: E731
    else:
        if len(name) < 250 and "\0" not in name:
            path.write_bytes(content)
        read = lambda: read_prompts(path)  # noqa: E731
    found = taken_or_refused(read)
    assert (found is None) == (len(name) > 250 or "\0" in name)


def test_a_folder_of_pictures_of_odd_names(tmp_path):
    from memorization.runs.pictures import read_pictures

    for name in NAMES:
        if len(name) < 250 and "\0" not in name:
            Image.new("RGB", (4, 4)).save(tmp_path / f"{name}.png")
    os.mkfifo(tmp_path / "pipe.png")
    assert len(list_pictures(tmp_path)) == len(NAMES) - 2
    with within(10):
        assert len(read_pictures(tmp_path).hashes["images"]) == 64
    refused(lambda: list_pictures(tmp_path / ("b" * 300)))


def test_a_calibration_of_what_overflows_is_not_written(tmp_path):
    lines = rows()
    for row in lines:
        row["noise_norm"] = [1.7e308, 1.7e308 * (row["id"] % 2)]
    folder = write_run(tmp_path / "run", lines=lines)
    refused(lambda: eval_command.main([str(folder), "--calibrate", str(tmp_path / "c.yaml")]), "c.yaml", "noise_norm")
    assert not (tmp_path / "c.yaml").exists()


@pytest.mark.parametrize("kind", ["pipe", "folder", "device"])
def test_a_calibration_into_what_is_no_file(tmp_path, kind):
    path = make_odd(tmp_path / "c.yaml", kind)
    refused(lambda: eval_command.main([str(write_run(tmp_path / "run")), "--calibrate", str(path)]), "no regular file")


@pytest.mark.parametrize(
    "flags", [["--fpr", "1"], ["--fpr", "0"], ["--fpr", "nan"], ["--resamples", "0"], ["--fpr", "x"]]
)
@pytest.mark.parametrize("study", [None, "sequential"])
def test_flags_of_evaluations(tmp_path, flags, study):
    from memorization.studies import sequential

    main = sequential.main if study else eval_command.main
    refused(lambda: main([str(write_run(tmp_path)), *flags]), flags[0])


@pytest.mark.parametrize("fpr", ["0.999", "0.9", "1e-9"])
def test_extreme_rates_are_calibrated(tmp_path, fpr):
    eval_command.main([str(write_run(tmp_path / "run")), "--calibrate", str(tmp_path / "c.yaml"), "--fpr", fpr])


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_few_prompts(tmp_path, count):
    folder = write_run(tmp_path, {**RECORD, "lines": count}, rows(count))
    taken_or_refused(lambda: eval_command.main([str(folder), "--resamples", "100"]))


def test_a_clock_that_is_set_back_gives_no_negative_seconds(tmp_path, monkeypatch):
    times = iter(range(10_000, 0, -100))
    monkeypatch.setattr(store_module.time, "time", lambda: next(times))
    with ResultStore(tmp_path, {}, {}) as store:
        store.start()
    assert 0 <= read_json(tmp_path / "run.json")["seconds"] < 5


def test_a_name_that_is_not_utf_8_comes_back_from_the_record(tmp_path):
    name = os.fsdecode(b"caf\xe9")
    write_atomically(tmp_path / "a.json", json.dumps({"name": name}, ensure_ascii=False))
    assert read_json(tmp_path / "a.json") == {"name": name}


@pytest.mark.parametrize("script", ["run_detection.sh", "run_mitigation.sh", "run_amg.sh"])
@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_shell_scripts_explain_themselves(tmp_path, script, flag):
    done = subprocess.run(["bash", ROOT / script, flag], cwd=tmp_path, capture_output=True, text=True, timeout=20,
                          env={**os.environ, "PYTHON": sys.executable})  # fmt: skip
    assert done.returncode == 0 and f"bash {script}" in done.stdout and not done.stderr


STUB = """#!/usr/bin/env bash
case $1 in -) exit 0 ;; -c) exit 1 ;; esac
printf '%s\\n' "$@"
"""


@pytest.mark.parametrize("script", ["run_detection.sh", "run_mitigation.sh", "run_amg.sh"])
def test_shell_scripts_resolve_the_callers_paths(tmp_path, script):
    (tmp_path / "stub").write_text(STUB)
    (tmp_path / "stub").chmod(0o755)
    (tmp_path / "model").mkdir()
    (tmp_path / "mine.txt").write_text("a\n")
    done = subprocess.run(
        ["bash", os.path.relpath(ROOT / script, tmp_path), "model"], cwd=tmp_path, capture_output=True, text=True,
        timeout=20, env={**os.environ, "PYTHON": "./stub", "RESULTS": "out", "DETECT_FLAGS": "--prompts mine.txt"},
    )  # fmt: skip
    said = done.stdout.splitlines()
    made = any(line.startswith(f"{tmp_path}/out/model") for line in said)
    assert str(tmp_path / "model") in said and made, done.stdout + done.stderr
    assert script != "run_detection.sh" or str(tmp_path / "mine.txt") in said
