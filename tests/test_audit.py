"""The audit of a fine-tune: known copies are found, a killed run goes on, bad input is one line."""

import json
import shutil
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from audited import CAPTIONS, COPIED, FLAGS, TINY, Given, numbers, save_run
from faults import refused
from PIL import Image
from safetensors.torch import load_file, save_file

from memorization import cli
from memorization.audit import run
from memorization.audit.adapters import find_adapters
from memorization.audit.engine import Plan
from memorization.audit.findings import copy_limits, findings, spacing_limit
from memorization.audit.measures.nl2 import ByNl2
from memorization.audit.run import FINDINGS
from memorization.audit.signals.base import SIGNALS, Look
from memorization.audit.training import read_training
from memorization.audit.tries import beginning, paraphrased
from memorization.cli import audit as command
from memorization.evaluation.intervals import lower_end, upper_end
from memorization.index.duplicates import find_duplicates, near_copies
from memorization.io.files import read_lines
from memorization.io.training import find_captions
from memorization.models.loading import load_model
from memorization.models.lora import holds_lora

SMALL = ["--paraphrases", "0", "--noises", "1"]  # four captions and the trigger, one noise each


@pytest.fixture(scope="module")
def place(audited_place):
    return audited_place


def audit(place, out, *more, adapter=None):
    command.main([*FLAGS, "--adapter", str(adapter or place / "lora"), "--training", str(place / "set"),
                  "--out", str(out), *more])  # fmt: skip


def test_known_copies_are_found_at_the_epoch_that_makes_them(place):
    found = numbers(place / "out")
    assert [one["name"] for one in found["epochs"]] == ["(base)", "mine-000001", "mine-000002", "mine"]
    assert [one["copies"]["caption"]["copies"] for one in found["epochs"]] == [0, 0, 0, len(COPIED)]
    assert [one["gained"] for one in found["epochs"]] == [0, 0, 0, len(COPIED)]
    verdicts = [picture["epochs"]["mine"]["verdict"] for picture in found["pictures"]]
    assert [verdict == "at risk" for verdict in verdicts] == [True, True, False, False]  # too few pictures for more
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
    assert len(limits) == 5 and all(limit["source"] for limit in limits)
    assert all(limit["source"] in said for limit in limits) and "recommended epoch: mine-000002" in said


def test_a_killed_audit_goes_on_to_the_same_bytes(place, tmp_path):
    out = shutil.copytree(place / "killed", tmp_path / "out")
    whole, partial = ((folder / "scores.jsonl").read_bytes() for folder in (place / "out", out))
    assert partial == whole[: len(partial)] and 0 < len(partial) < len(whole)
    (out / "scores.jsonl").write_bytes(partial + b'{"id": 9')
    audit(place, out)
    for name in ("scores.jsonl", *FINDINGS):
        assert (out / name).read_bytes() == (place / "out" / name).read_bytes()
    pictures = {path.name: path.read_bytes() for path in (out / "pictures").iterdir()}
    assert pictures == {path.name: path.read_bytes() for path in (place / "out" / "pictures").iterdir()}


def test_a_run_is_complete_once_all_is_written(place, tmp_path, monkeypatch):
    """Killed before audit.json is written it is not, the audit.json of fewer epochs is gone, and it goes on."""
    out = shutil.copytree(place / "out", tmp_path / "out")
    lines = (out / "scores.jsonl").read_bytes().splitlines(keepends=True)
    (out / "scores.jsonl").write_bytes(b"".join(lines[:-1]))
    state = []

    def look(*arguments):
        state.append((json.loads((out / "run.json").read_text())["status"], (out / "audit.json").exists()))
        return findings(*arguments)

    monkeypatch.setattr(run, "findings", look)
    audit(place, out)
    record = json.loads((out / "run.json").read_text())
    assert state == [("running", False)] and record["status"] == "complete" and record["lines"] == len(lines)
    (out / "run.json").write_text(json.dumps({**record, "status": "running"}))  # killed once all lines were there
    audit(place, out)
    assert json.loads((out / "run.json").read_text())["status"] == "complete"


def test_beginning_anew_leaves_nothing_of_before(place, tmp_path):
    out = shutil.copytree(place / "killed", tmp_path / "out")
    (out / "audit.json").write_text("{}")
    (out / "pictures" / "000099.png").write_bytes(b"old")
    shutil.copy(place / "lora" / "mine.safetensors", other := tmp_path / "other.safetensors")
    spoil_names(other)
    refused(lambda: audit(place, out, "--overwrite", *SMALL, adapter=other), "made for another one?")
    assert not (out / "audit.json").exists() and not (out / "pictures" / "000099.png").exists()
    assert json.loads((out / "run.json").read_text())["status"] == "stopped"


def test_epochs_may_be_added_at_the_end_and_nowhere_else(place, tmp_path):
    two = [str(place / "lora" / f"mine-00000{i}.safetensors") for i in (1, 2)]
    flags = [*FLAGS, "--training", str(place / "set"), "--out", str(tmp_path), "--adapter"]
    shutil.copytree(place / "out", tmp_path, dirs_exist_ok=True)
    lines = (tmp_path / "scores.jsonl").read_bytes().splitlines(keepends=True)
    record = json.loads((tmp_path / "run.json").read_text())
    (tmp_path / "scores.jsonl").write_bytes(b"".join(lines[:18]))  # as if the first epoch alone had been asked for
    (tmp_path / "run.json").write_text(json.dumps({**record, "epochs": record["epochs"][:1], "lines": 18}))
    command.main([*flags, *two])
    assert (tmp_path / "scores.jsonl").read_bytes() == b"".join(lines[:27])
    assert [one["name"] for one in numbers(tmp_path)["epochs"]] == ["(base)", "mine-000001", "mine-000002"]
    gone = ("epoch mine-000001 was audited there and is not given any more (1 such)", "put back", "--out")
    refused(lambda: command.main([*flags, two[1]]), *gone)
    refused(lambda: command.main([*flags, two[0]]), "epoch mine-000002 was audited there and is not given any more")
    shutil.copy(place / "lora" / "mine.safetensors", tmp_path / "mine-000001.safetensors")
    refused(lambda: command.main([*flags, str(tmp_path / "mine-000001.safetensors"), two[1]]),
            "epoch mine-000001 is not the file that was audited there")  # fmt: skip
    shutil.copy(place / "lora" / "mine.safetensors", tmp_path / "mine-000000.safetensors")
    refused(lambda: command.main([*flags, str(tmp_path / "mine-000000.safetensors"), *two]),
            "epoch mine-000000 comes before others")  # fmt: skip


def test_a_whole_checkpoint_is_audited_as_an_adapter_is(place, tmp_path):
    shutil.copytree(TINY, tmp_path / "tuned")
    audit(place, tmp_path / "out", *SMALL, adapter=tmp_path / "tuned")
    rows, _ = read_lines(tmp_path / "out" / "scores.jsonl")
    assert len(rows) == 10 and rows[5]["epoch"] == "tuned" and rows[5]["difference"] == [0]
    assert [row["nl2"] for row in rows[:5]] == [row["nl2"] for row in rows[5:]]


def test_watching_audits_what_is_new():
    from memorization.audit.run import watch
    from memorization.errors import InputError

    states = iter([InputError("torn"), ["a"], ["a"], InputError("torn"), ["a", "b"], ["b"], ["b", "c"]])
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
    assert seen == [["a"], ["a", "b"], ["b", "c"]]  # what is new is audited, though as many as before


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


def test_the_limit_is_the_nearer_of_two():
    base, nearest = np.array([1.0, 2.0, 3.0, 4.0]), np.array([0, 1, 0, 1])

    def limit(apart, families, rate):
        return copy_limits(Given(apart), base, nearest, np.array(families), rate).usual

    far, near = [[9, 9], [9, 9]], [[0, 0.5], [0.7, 0]]
    assert limit(far, [0, 1], 0.01).value == 1.0
    assert limit(far, [0, 1], 0.25).value == 2.0  # one of four may lie beyond
    assert limit(near, [0, 1], 0.01).value == pytest.approx(0.5 * (0.01 / 2) ** (1 / 8), abs=1e-4)
    assert "training pictures' distances" in limit(near, [0, 1], 0.01).source
    assert limit(near, [0, 0], 0.01).value == 1.0  # near-copies say nothing


def normals(count, width, seed):
    return np.random.default_rng(seed).standard_normal((count, width))


def apart(some, others):
    return np.linalg.norm(some[:, None] - others[None], axis=2)


@pytest.mark.parametrize("width", [4, 16])
@pytest.mark.parametrize("count", [10, 20, 50])
def test_new_pictures_of_the_kind_are_hardly_ever_within_the_limit_of_training_pictures(width, count):
    """The nearest of the training pictures' distances would take 19% of them, of 10 pictures in 16 dimensions."""
    shares = []
    for seed in range(10):
        training = normals(count, width, seed)
        limit = spacing_limit(Given(apart(training, training)), np.arange(count), 0.01)
        shares.append((apart(normals(200, width, 99 + seed), training).min(1) < limit).mean())
        assert limit > 0.05 * np.sort(apart(training, training)[np.triu_indices(count, 1)])[count // 2]
    assert np.mean(shares) < (0.03 if width == 4 else 0.01)


def test_cosines_have_the_limit_of_their_distances():
    class Cosines(Given):
        lower_is_nearer = False

    vectors = normals(20, 16, 0)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    by_distance, by_cosine = Given(apart(vectors, vectors)), Cosines(vectors @ vectors.T)
    limits = [spacing_limit(measure, np.arange(20), 0.01) for measure in (by_distance, by_cosine)]
    assert limits[0] == pytest.approx(limits[1])
    found = copy_limits(by_cosine, np.zeros(40), np.arange(40) // 2, np.arange(20), 0.01)
    assert (
        found.usual.value == pytest.approx(1 - limits[0] ** 2 / 2, abs=1e-4) and (found.of == found.usual.value).all()
    )


def test_one_close_pair_of_training_pictures_does_not_move_the_limit_to_it():
    training = normals(20, 16, 0)
    alone = spacing_limit(Given(apart(training, training)), np.arange(20), 0.01)
    training[1] = training[0] + 0.01
    assert spacing_limit(Given(apart(training, training)), np.arange(20), 0.01) > 0.7 * alone


@pytest.mark.parametrize("known", [1, 2])
def test_a_training_picture_that_the_base_draws_itself_hides_no_copies_of_others(tmp_path, known):
    random = np.random.default_rng(0)
    base = 2 + random.random((20, 20))
    base[:known] = 0.1 + 0.1 * random.random((known, 20))
    tuned = base.copy()
    tuned[known:] = 0.3
    found = save_run(tmp_path, base, {"tuned": tuned})
    own = np.round(base[:known].min(1), 4)
    assert sorted(one["limit"] for one in found["known"]) == sorted(own.tolist())
    assert sorted(one["training"] for one in found["known"]) == [[f"{i}.png"] for i in range(known)]
    assert all(one["drawn"] == 20 for one in found["known"]) and found["limits"][0]["value"] > 2
    assert found["epochs"][1]["gained"] == 20 * (20 - known) - 3  # of the base three of the others lie beyond it too
    assert found["recommended"] is None


def test_verdicts_compare_the_ends_of_intervals(tmp_path):
    """The lower end of a picture's copies with the upper end of the base's, which few pictures leave high."""
    base = np.full((20, 8), 2.0)
    twice, thrice = base.copy(), base.copy()
    twice[3, :2] = thrice[3, :3] = 0
    found = save_run(tmp_path / "many", base, {"twice": twice, "thrice": thrice})
    each = 1 - 0.05 / 20  # of 20 pictures
    assert lower_end(2, 8, each) < upper_end(0, 160) < lower_end(3, 8, each)
    assert [found["pictures"][3]["epochs"][name]["verdict"] for name in ("twice", "thrice")] == ["at risk", "copied"]
    assert found["pictures"][3]["copied_from"] == "thrice" and found["recommended"] == "twice"
    assert found["limits"][2]["value"] == pytest.approx(upper_end(0, 160), rel=1e-5)
    few = save_run(tmp_path / "few", base[:4], {"thrice": thrice[:4]})
    assert upper_end(0, 32) > lower_end(3, 8, 1 - 0.05 / 4)
    assert few["pictures"][3]["epochs"]["thrice"]["verdict"] == "at risk"


def test_an_epoch_is_recommended_until_it_is_seen_to_copy(tmp_path):
    """By the lower end of its share: what chance alone makes of a share of 1% is no copying."""
    base = 2 + np.random.default_rng(0).random((200, 5))
    base.flat[:11] = np.arange(11) / 100 + 1  # ten of 1000 lie beyond the eleventh
    other = 2 + np.random.default_rng(1).random((200, 5))
    chance, more = other.copy(), other.copy()
    chance[:14, 0] = more[:25, 0] = 0.5
    found = save_run(tmp_path / "run", base, {"same": base, "chance": chance, "more": more})
    assert [one["copies"]["caption"]["copies"] for one in found["epochs"]] == [10, 10, 14, 25]
    assert [(one["gained"], one["lost"]) for one in found["epochs"]] == [(0, 0), (0, 0), (12, 8), (23, 8)]
    assert found["recommended"] == "chance" and found["limits"][1]["value"] == 0.01
    assert lower_end(14, 1000, 0.975) < 0.01 < lower_end(25, 1000, 0.975)


def test_findings_leave_an_epoch_out_that_is_not_complete(place):
    rows, _ = read_lines(place / "out" / "scores.jsonl")
    training = read_training(place / "set", (32, 32))
    found = findings(rows[:-1], training, [ByNl2(training.pictures)], "difference", 0.01)
    assert [one["name"] for one in found["epochs"]] == ["(base)", "mine-000001", "mine-000002"]
    assert found["limits"][3]["value"] is None and "nothing to take a limit from" in found["limits"][3]["source"]


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


def save_lora(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({"unet.x.lora_A.weight": torch.zeros(1)}, path)


def test_the_last_file_beside_the_folders_of_the_earlier_ones_comes_last(tmp_path):
    """As diffusers' trainers save; whatever their folder is called."""
    for folder in ("a-run/checkpoint-1000", "a-run/checkpoint-500", "a-run"):
        save_lora(tmp_path / folder / "pytorch_lora_weights.safetensors")
    found = find_adapters([tmp_path / "a-run"])
    assert [one.path.parent.name for one in found] == ["checkpoint-500", "checkpoint-1000", "a-run"]
    assert len({one.name for one in found}) == 3


def test_files_that_are_alike_in_folders_that_are_alike_come_in_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files = [Path(folder) / "p.safetensors" for folder in ("b/x", "", "a/x")]
    for file in files:
        save_lora(file)
    assert [one.path for one in find_adapters(files)] == [files[2], files[0], files[1]]
    assert [one.name for one in find_adapters(files[:2])] == ["x/p", f"{tmp_path.name}/p"]


def test_of_a_file_without_a_lora_the_header_alone_is_read(tmp_path):
    size = 1 << 26
    header = json.dumps({"vae.weight": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    with open(tmp_path / "vae.safetensors", "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + size)
    tracemalloc.start()
    assert not holds_lora(tmp_path / "vae.safetensors")
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < size / 10


def test_files_of_a_folder_that_hold_no_lora_are_left_out(tmp_path, capsys):
    save_lora(tmp_path / "mine.safetensors")
    for name in ("vae", "optimizer", "embedding"):
        save_file({f"{name}.weight": torch.zeros(1)}, tmp_path / f"{name}.safetensors")
    assert [one.name for one in find_adapters([tmp_path])] == ["mine"]
    find_adapters([tmp_path])  # said once
    said = capsys.readouterr().err.splitlines()
    assert sorted(said) == [f"{tmp_path}/{name}.safetensors: left out, it holds no LoRA"
                            for name in ("embedding", "optimizer", "vae")]  # fmt: skip
    (tmp_path / "torn.safetensors").write_bytes(b"torn")
    refused(lambda: find_adapters([tmp_path]), "torn.safetensors: no whole file")
    (tmp_path / "torn.safetensors").unlink()
    (tmp_path / "mine.safetensors").unlink()
    refused(lambda: find_adapters([tmp_path]), "holds no adapter")


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
    refused(lambda: audit(place, tmp_path / "out", *SMALL, adapter=path), said, str(path))


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


def test_another_deciding_measure_is_another_audit(place, monkeypatch):
    class Other(Given):
        name = "other"

    def both(known):
        return [ByNl2(known.pictures), Other(np.zeros((4, 4)))]

    monkeypatch.setattr(run, "make_measures", both)
    by_nl2, by_other = (
        run.prepare(load_model(TINY, device="cpu", dtype="float32"), place / "set", plan, run.Asked(measure=measure))
        for plan in [Plan(1, 51, 3, 3.0, 4)] for measure in ("nl2", "other")
    )  # fmt: skip
    assert {key for key, value in by_nl2.settings.items() if by_other.settings[key] != value} == {"decides"}
    assert by_other.measures[0].name == by_other.settings["decides"] == "other"


def test_the_training_pictures_are_found_from_anywhere(place, monkeypatch):
    monkeypatch.chdir(place)
    files = [one["file"] for one in run.files_of(read_training(Path("set"), (8, 8)))]
    assert files == [str((place / "set" / f"{i}.png").resolve()) for i in range(4)]


def test_other_bad_input(place, tmp_path):
    refused(lambda: audit(place, tmp_path, "--measure", "taste"), "--measure taste: cannot be had here", "nl2")
    refused(lambda: audit(place, place / "out", "--seed", "3"), "seed: 51 there, 3 asked")
    refused(lambda: audit(place, tmp_path, "--noises", "0"), "whole number of at least 1")
    refused(lambda: find_captions(tmp_path / "nowhere"), "no such folder")
