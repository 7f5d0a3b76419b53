"""The audit of a fine-tune: known copies are found, a killed run goes on, bad input is one line."""

import json
import os
import shutil
import subprocess
import sys

import audited
import numpy as np
import pytest
import torch
from audited import CAPTIONS, COPIED, FLAGS, TINY, numbers
from conftest import GOLDEN
from faults import refused
from PIL import Image
from safetensors.torch import load_file, save_file

from memorization import cli
from memorization.audit.adapters import find_adapters
from memorization.audit.findings import copy_limit, findings
from memorization.audit.measures.nl2 import ByNl2
from memorization.audit.signals.base import SIGNALS, Look
from memorization.audit.training import read_training
from memorization.audit.tries import beginning, paraphrased
from memorization.cli import audit as command
from memorization.index.duplicates import find_duplicates, near_copies
from memorization.io.files import read_lines
from memorization.io.training import find_captions

ROOT = GOLDEN.parent.parent


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with ``lora/``, ``set/`` and an audit of both in ``out/``."""
    place = tmp_path_factory.mktemp("audit")
    epochs = audited.save_epochs(place / "lora")
    audited.save_training(place / "set", epochs[-1])
    audit(place, place / "out")
    return place


def audit(place, out, *more, adapter=None):
    command.main([*FLAGS, "--adapter", str(adapter or place / "lora"), "--training", str(place / "set"),
                  "--out", str(out), *more])  # fmt: skip


def test_known_copies_are_found_at_the_epoch_that_makes_them(place):
    found = numbers(place / "out")
    assert [one["name"] for one in found["epochs"]] == ["(base)", "mine-000001", "mine-000002", "mine"]
    assert [one["copies"]["caption"]["copies"] for one in found["epochs"]] == [0, 0, 0, len(COPIED)]
    assert [p["copied_from"] for p in found["pictures"]] == ["mine", "mine", None, None]
    assert found["recommended"] == "mine-000002"
    rows, _ = read_lines(place / "out" / "scores.jsonl")
    last = [row for row in rows if row["epoch"] == "mine" and row["kind"] == "caption"]
    for i in COPIED:  # the picture is the training picture itself, to the byte
        assert last[i]["nl2"][0] == 0 and last[i]["nl2_nearest"][0] == i and last[i]["shown"] == 0
        made = Image.open(place / "out" / "pictures" / f"{last[i]['id']:06d}.png")
        assert (np.asarray(made) == np.asarray(Image.open(place / "set" / f"{i}.png"))).all()


def test_an_epoch_that_changes_nothing_is_the_base(place):
    rows, _ = read_lines(place / "out" / "scores.jsonl")
    base, same = ([row for row in rows if row["epoch"] == name] for name in ("(base)", "mine-000001"))
    for one, other in zip(base, same, strict=True):
        assert one["nl2"] == other["nl2"] and one["nl2_nearest"] == other["nl2_nearest"]
        if one["kind"] == "caption":
            assert other["difference"] == [0, 0] and other["guidance_ratio"] == [1, 1] and other["loss_gap"] == [0, 0]


def test_captions_paraphrases_trigger_and_own_prompts_are_tried(place):
    rows, _ = read_lines(place / "out" / "scores.jsonl")
    kinds = [row["kind"] for row in rows if row["epoch"] == "mine"]
    assert kinds == ["caption"] * 4 + ["paraphrase"] * 4 + ["trigger"]
    assert rows[8]["prompt"] == "zwx" and rows[4]["prompt"] == "a kite over a harbour, zwx"
    assert beginning(["a cat, red", "a cat, blue"]) == "a cat" and beginning(["cat", "dog"]) == ""
    assert paraphrased("one thing")[0] == "an image that shows one thing"


def test_every_limit_says_where_it_comes_from(place, capsys):
    audit(place, place / "out")
    said = capsys.readouterr().out
    limits = numbers(place / "out")["limits"]
    assert len(limits) == 4 and all(limit["source"] for limit in limits)
    assert all(limit["source"] in said for limit in limits) and "recommended epoch: mine-000002" in said


def test_a_killed_audit_goes_on_to_the_same_bytes(place, tmp_path):
    arguments = [*FLAGS, "--adapter", str(place / "lora"), "--training", str(place / "set"), "--out", str(tmp_path)]
    dying = f"""
import os, signal
from memorization.audit import engine
plain, calls = engine.save_picture, []
def save(*a):
    calls.append(1)
    if len(calls) == 15:
        os.kill(os.getpid(), signal.SIGKILL)
    plain(*a)
engine.save_picture = save
from memorization.cli import audit
audit.main({arguments!r})
"""
    died = subprocess.run([sys.executable, "-c", dying], cwd=ROOT, capture_output=True, env={**os.environ})
    assert died.returncode == -9
    whole = (place / "out" / "scores.jsonl").read_bytes()
    partial = (tmp_path / "scores.jsonl").read_bytes()
    assert partial == whole[: len(partial)] and 0 < len(partial) < len(whole)
    (tmp_path / "scores.jsonl").write_bytes(partial + b'{"id": 9')
    command.main(arguments)
    for name in ("scores.jsonl", "audit.json", "epochs.csv", "pictures.csv"):
        assert (tmp_path / name).read_bytes() == (place / "out" / name).read_bytes()
    pictures = {path.name: path.read_bytes() for path in (tmp_path / "pictures").iterdir()}
    assert pictures == {path.name: path.read_bytes() for path in (place / "out" / "pictures").iterdir()}


def test_epochs_may_be_added_at_the_end_and_nowhere_else(place, tmp_path):
    two = [str(place / "lora" / f"mine-00000{i}.safetensors") for i in (1, 2)]
    flags = [*FLAGS, "--training", str(place / "set"), "--out", str(tmp_path), "--adapter"]
    command.main([*flags, two[0]])
    command.main([*flags, *two])
    rows, _ = read_lines(tmp_path / "scores.jsonl")
    assert rows == read_lines(place / "out" / "scores.jsonl")[0][:27]
    refused(lambda: command.main([*flags, two[1]]), "other epochs, from mine-000001 on")


def test_a_whole_checkpoint_is_audited_as_an_adapter_is(place, tmp_path):
    shutil.copytree(TINY, tmp_path / "tuned")
    audit(place, tmp_path / "out", "--paraphrases", "0", adapter=tmp_path / "tuned")
    rows, _ = read_lines(tmp_path / "out" / "scores.jsonl")
    assert len(rows) == 10 and rows[5]["epoch"] == "tuned" and rows[5]["difference"] == [0, 0]
    assert [row["nl2"] for row in rows[:5]] == [row["nl2"] for row in rows[5:]]


def test_watching_audits_what_is_new():
    from memorization.audit.run import watch
    from memorization.errors import InputError

    states = iter([InputError("torn"), ["a"], ["a"], ["a", "b"]])
    seen = []

    def look():
        state = next(states, None)
        if state is None:
            raise KeyboardInterrupt
        if isinstance(state, Exception):
            raise state
        return state

    with pytest.raises(KeyboardInterrupt):
        watch(look, seen.append, lambda: None)
    assert seen == [["a"], ["a", "b"]]


# ---------------------------------------------------------------- numbers


def test_signals_by_value():
    shape = (1, 2, 1, 2, 2)
    tuned = Look(torch.full(shape, 3.0), torch.full(shape, 1.0), torch.zeros(1, 1, 1, 2, 2))
    base = Look(torch.full(shape, 2.0), torch.full(shape, 1.5), torch.zeros(1, 1, 1, 2, 2))
    values = {name: SIGNALS.make(name)(tuned, base).tolist() for name in SIGNALS}
    assert values == {"guidance": [[2, 2]], "guidance_ratio": [[4, 4]], "difference": [[1, 1]], "loss_gap": [[-5, -5]]}


def test_a_signal_is_what_the_trace_says(place, tiny_eps):
    """``guidance`` of the base against the pipeline's own trace."""
    from memorization.audit.tries import seed_of

    rows, _ = read_lines(place / "out" / "scores.jsonl")
    noise = tiny_eps.pure_noise(2, seed_of(51, CAPTIONS[2], 1))
    with torch.no_grad():
        step = tiny_eps.trace(tiny_eps.embed([CAPTIONS[2]]), noise, [981])[981]
    expected = step.guidance.flatten(2).norm(dim=2)[0] * step.sigma / step.alpha / step.guidance[0, 0].numel() ** 0.5
    assert rows[2]["guidance"] == pytest.approx(expected.tolist(), rel=1e-4)


class Given(ByNl2):
    """Distances that are given."""

    def __init__(self, apart):
        self._apart = np.array(apart)

    def apart(self):
        return self._apart


def test_the_limit_is_the_nearer_of_two():
    alone = np.arange(2)
    far = Given([[9, 9], [9, 9]])
    base = np.array([1.0, 2.0, 3.0, 4.0])
    assert copy_limit(far, base, alone, 0.01).value == 1.0
    assert copy_limit(far, base, alone, 0.25).value == 2.0  # one of four may lie beyond
    near = copy_limit(Given([[0, 0.5], [0.7, 0]]), base, alone, 0.01)
    assert near.value == 0.5 and "training pictures' distances" in near.source
    assert copy_limit(Given([[0, 0.5], [0.7, 0]]), base, np.zeros(2), 0.01).value == 1.0  # near-copies say nothing


def test_findings_leave_an_epoch_out_that_is_not_complete(place):
    rows, _ = read_lines(place / "out" / "scores.jsonl")
    training = read_training(place / "set", (32, 32))
    found = findings(rows[:-1], training, [ByNl2(training.pictures)], "difference", 0.01)
    assert [one["name"] for one in found["epochs"]] == ["(base)", "mine-000001", "mine-000002"]
    assert found["limits"][2]["value"] is None and "nothing to take a limit from" in found["limits"][2]["source"]


# ---------------------------------------------------------------- training folders


def save_noise(path, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (40, 60, 3), dtype=np.uint8)).save(path)
    return path


def test_forms_of_training_folders(tmp_path):
    for i in range(2):
        save_noise(tmp_path / "kohya" / "10_zwx cat" / f"{i}.png", i).with_suffix(".txt").write_text(f"cat {i}\n")
        save_noise(tmp_path / "diffusers" / f"{i}.png", i)
    lines = [{"file_name": f"{i}.png", "text": f"cat {i}"} for i in range(2)]
    (tmp_path / "diffusers" / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    (tmp_path / "list.csv").write_text("image,caption\ndiffusers/0.png,cat 0\ndiffusers/1.png,cat 1\n")
    for source in ("kohya", "diffusers", "list.csv"):
        found = read_training(tmp_path / source, (32, 32))
        assert list(found.captions) == ["cat 0", "cat 1"] and found.pictures.shape == (2, 32, 32, 3)
    middle = Image.open(tmp_path / "diffusers" / "0.png").crop((10, 0, 50, 40)).resize((32, 32), Image.LANCZOS)
    difference = found.pictures[0].astype(int) - np.asarray(middle)
    assert np.abs(difference[:, 2:-2]).max() <= 1  # the middle, not squeezed; its edges see what lies beside it


def test_near_copies_share_a_family(tmp_path):
    first, smooth = tmp_path / "a.png", Image.open(save_noise(tmp_path / "c.png", 1)).resize((6, 4)).resize((120, 80))
    smooth.save(first)
    smooth.resize((60, 40)).save(tmp_path / "b.jpg", quality=80)
    files = [first, save_noise(tmp_path / "c.png", 2), tmp_path / "b.jpg"]
    assert near_copies(files).tolist() in ([0, 1, 0], [1, 0, 1])


def test_duplicates_of_a_training_folder(tmp_path, capsys):
    smooth = Image.open(save_noise(tmp_path / "set" / "c.png", 1)).resize((6, 4)).resize((120, 80))
    smooth.save(tmp_path / "set" / "a.png")
    smooth.resize((60, 40)).save(tmp_path / "set" / "b.jpg", quality=80)
    for name, caption in (("a", "A  cat"), ("b", "a dog"), ("c", "a cat")):
        (tmp_path / "set" / f"{name}.txt").write_text(caption)
    found = find_duplicates(tmp_path / "set")
    assert [[file.name for file in group] for group in found.pictures] == [["a.png", "b.jpg"]]
    assert {caption: [file.name for file in own] for caption, own in found.captions.items()} == {
        "a cat": ["a.png", "c.png"]
    }
    cli.dispatch(["index", "duplicates", str(tmp_path / "set"), "--out", str(tmp_path / "sheet.png")])
    assert "near-copies: a.png, b.jpg" in capsys.readouterr().out and Image.open(tmp_path / "sheet.png").width > 100


def test_epochs_are_ordered_as_they_were_saved(tmp_path):
    names = ["my-2.safetensors", "my-10.safetensors", "my.safetensors"]
    for name in reversed(names):
        save_file({"unet.x.lora_A.weight": torch.zeros(1)}, tmp_path / name)
    assert [one.path.name for one in find_adapters([tmp_path])] == names
    for step, name in enumerate(reversed(names)):
        save_file({"unet.x.lora_A.weight": torch.zeros(1)}, tmp_path / name, metadata={"ss_steps": str(step)})
    assert [one.path.name for one in find_adapters([tmp_path])] == names[::-1]
    save_file({"unet.x.lora_A.weight": torch.zeros(1)}, tmp_path / "x.safetensors", metadata={"ss_steps": "1"})
    refused(lambda: find_adapters([tmp_path]), "both say that they are of step 1")


# ---------------------------------------------------------------- bad input


def spoil_shape(path):
    save_file({key: torch.cat([value, value], 1) for key, value in load_file(path).items()}, path)


def spoil_names(path):
    save_file({f"unet.{key}": value for key, value in load_file(path).items()}, path)


def spoil_number(path):
    save_file({key: value * float("nan") for key, value in load_file(path).items()}, path)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-100]), "no whole file in safetensors"),
        (lambda path: path.write_bytes(b""), "no whole file in safetensors"),
        (lambda path: path.unlink(), "no such file"),
        (lambda path: save_file({"unet.conv.weight": torch.zeros(2)}, path), "holds no LoRA"),
        (spoil_shape, "made for another one?"),
        (spoil_names, "made for another one?"),
        (spoil_number, "NaN"),
    ],
)
def test_bad_adapters_are_one_line(place, tmp_path, spoil, said):
    path = tmp_path / "one.safetensors"
    shutil.copy(place / "lora" / "mine.safetensors", path)
    spoil(path)
    refused(lambda: audit(place, tmp_path / "out", adapter=path), said, str(path))


def test_no_pickle_is_opened(place, tmp_path):
    (tmp_path / "one.bin").write_bytes(b"anything")
    refused(lambda: audit(place, tmp_path / "out", adapter=tmp_path / "one.bin"), "only safetensors are loaded")
    refused(lambda: audit(place, tmp_path / "out", adapter=tmp_path), "holds no adapter")


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({}, "holds no picture"),
        ({"a.png": "", "a.txt": "a cat", "b.png": ""}, "1 of 2 pictures have no caption, b.png the first"),
        ({"a.png": "", "a.txt": "a cat"}, "one picture only"),
        ({"a.png": "no picture", "a.txt": "a", "b.png": "", "b.txt": "b"}, "a.png: no picture that can be read"),
        ({"a.png": "", "metadata.jsonl": '{"file_name": "a.png"}\n'}, "needs a column"),
        ({"a.png": "", "metadata.jsonl": '{"file_name": "b.png", "text": "b"}\n'}, "names b.png, which is no file"),
        ({"a.png": "", "metadata.csv": "file_name,text\na.png,\n"}, "row 1 (a.png) has no caption"),
    ],
)
def test_bad_training_folders_are_one_line(place, tmp_path, files, said):
    folder = tmp_path / "set"
    folder.mkdir()
    for name, content in files.items():
        if content or not name.endswith(".png"):
            (folder / name).write_text(content)
        else:
            save_noise(folder / name)
    lora = str(place / "lora" / "mine.safetensors")
    refused(lambda: command.main([*FLAGS, "--adapter", lora, "--training", str(folder), "--out", str(tmp_path / "o")]),
            said)  # fmt: skip


def test_other_bad_input(place, tmp_path):
    refused(lambda: audit(place, tmp_path, "--measure", "taste"), "--measure taste: cannot be had here", "nl2")
    refused(lambda: audit(place, place / "out", "--seed", "3"), "seed: 51 there, 3 asked")
    refused(lambda: audit(place, tmp_path, "--noises", "0"), "whole number of at least 1")
    refused(lambda: find_captions(tmp_path / "nowhere"), "no such folder")
