"""Prompt lists as they are found, and the download of the published ones."""

import hashlib

import pandas as pd
import pytest

from memorization.errors import InputError
from memorization.io import published as module
from memorization.io.prompts import listed, near_copy_families, read_pair, read_prompts, sample
from memorization.io.published import fetch

AWKWARD = ['say "cheese", please', "<i>Title</i> & more", "naïve café ☕ — 東京", "a, b; c", " spaced ", "word " * 100]


def write(path, text, encoding="utf-8"):
    path.write_bytes(text.encode(encoding))
    return path


def test_txt_skips_and_counts_blank_lines(tmp_path):
    frame = read_prompts(write(tmp_path / "a.txt", "one\r\n\n  \ntwo\u2028still two\n"))
    assert frame["prompt"].tolist() == ["one", "two\u2028still two"]
    assert frame.attrs["blank_lines"] == 2


@pytest.mark.parametrize("separator", [",", ";"])
def test_csv_keeps_awkward_prompts(tmp_path, separator):
    quoted = [prompt.replace('"', '""') for prompt in AWKWARD]
    rows = "".join(f'"{prompt}"{separator}{i % 2}{separator}fam\n' for i, prompt in enumerate(quoted))
    frame = read_prompts(write(tmp_path / "a.csv", f"Caption{separator}label{separator}family\n{rows}", "utf-8-sig"))
    assert frame["prompt"].tolist() == AWKWARD
    assert frame["label"].tolist() == [0, 1, 0, 1, 0, 1]
    assert set(frame["family"]) == {"fam"}


def test_csv_and_jsonl_may_hold_an_empty_prompt_and_words_like_nan(tmp_path):
    assert read_prompts(write(tmp_path / "a.csv", 'prompt\nNA\n""\nnan\n'))["prompt"].tolist() == ["NA", "", "nan"]
    lines = '{"caption": "", "type": "VM"}\n\n{"caption": "b", "type": "TM"}\n'
    frame = read_prompts(write(tmp_path / "a.jsonl", lines))
    assert frame["prompt"].tolist() == ["", "b"] and frame["kind"].tolist() == ["VM", "TM"]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.txt", b"", "empty"),
        ("a.txt", b"\n \n", "empty"),
        ("a.txt", b"caf\xe9\n", "byte 3 is not UTF-8"),
        ("a.csv", b"text,label\nx,1\n", "no column 'prompt'.*text, label"),
        ("a.csv", b"prompt,label\nx,2\n", "label '2' in row 1"),
        ("a.csv", b'prompt\n"open\n', "malformed CSV"),
        ("a.csv", b"prompt,label\n", "holds no prompt"),
        ("a.csv", b"prompt,label\nHello, world,1\n", "row 1 has 3 cells, the header 2"),
        ("a.csv", b"prompt,split\nx,train\n", "validation and test"),
        ("a.jsonl", b'{"prompt": null}\n', "row 1 is no text: None"),
        ("a.jsonl", b'{"prompt": "\\ud800"}\n', "row 1 is no text"),
        ("a.jsonl", b'["ab"]\n', "line 1: not a JSON object"),
        ("a.jsonl", b'{"prompt": "x"}\n{broken\n', "line 2: not a JSON object"),
        ("a.parquet", b"PAR1", "not '.parquet'"),
    ],
)
def test_bad_lists_are_refused_in_one_line(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=said) as caught:
        read_prompts(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_a_list_with_prompt_and_caption_keeps_its_prompts(tmp_path):
    frame = read_prompts(write(tmp_path / "a.csv", "caption,Prompt\nx,y\n"))
    assert frame["prompt"].tolist() == ["y"]


def test_missing_list():
    with pytest.raises(InputError, match="no such file"):
        read_prompts("nowhere/a.txt")


def test_pair_gets_labels(tmp_path):
    frame = read_pair(write(tmp_path / "m.txt", "a\nb\n"), write(tmp_path / "n.txt", "c\n"))
    assert frame["prompt"].tolist() == ["a", "b", "c"] and frame["label"].tolist() == [1, 1, 0]


def test_near_copies_share_a_family():
    families = near_copy_families(
        ["Acme Rugs Blue Line 12", "Acme Rugs Blue Line 14", "Acme Rugs Red Line 14", "", "a cat on a mat", ""]
    )
    assert families[0] == families[1] == families[2] != families[4]
    assert families[3] == families[5] != families[4]


@pytest.fixture
def mirror(tmp_path, monkeypatch):
    """A folder of stand-ins for the published lists, and their sha256."""
    folder = tmp_path / "mirror"
    folder.mkdir()
    published = {}
    for name, (repository, _) in module.PUBLISHED.items():
        content = f"a stand-in for {name}\n".encode()
        (folder / name).write_bytes(content)
        published[name] = (repository, hashlib.sha256(content).hexdigest())
    monkeypatch.setattr(module, "PUBLISHED", published)
    return folder


@pytest.mark.parametrize("as_url", [False, True])
def test_fetch_from_a_mirror(mirror, tmp_path, as_url):
    out = tmp_path / "out"
    paths = fetch(out, mirror.as_uri() if as_url else str(mirror))
    assert sorted(path.name for path in paths) == sorted(module.PUBLISHED)
    assert all(path.read_bytes() == (mirror / path.name).read_bytes() for path in paths)


def test_fetch_leaves_right_files_alone_and_mends_wrong_ones(mirror, tmp_path):
    out = tmp_path / "out"
    first = fetch(out, str(mirror))[0]
    first.write_text("spoilt")
    (mirror / "RV_mem.txt").unlink()  # not needed again: it is there already
    fetch(out, str(mirror))
    assert first.read_bytes() == (mirror / first.name).read_bytes()


def test_fetch_refuses_a_changed_file(mirror, tmp_path):
    (mirror / "sd1_nmem.txt").write_text("something else")
    with pytest.raises(InputError, match=r"sd1_nmem\.txt: sha256"):
        fetch(tmp_path / "out", str(mirror))
    assert not (tmp_path / "out" / "sd1_nmem.txt").exists()


def test_fetch_says_where_it_failed(tmp_path):
    with pytest.raises(InputError, match=r"cannot be had.*mirror"):
        fetch(tmp_path / "out", str(tmp_path / "nowhere"))


@pytest.mark.parametrize(
    ("families", "kept"), [([0, 1], True), (["a", "b"], True), (["a", ""], False), (["a", None], False)]
)
def test_families_that_are_named_are_kept_and_all_or_none_count(families, kept):
    frame = pd.DataFrame({"prompt": ["a red kite", "two boats"], "label": [0, 1], "family": families})
    assert listed(frame).frame["family"].tolist() == (families if kept else ["f0", "f1"])


@pytest.mark.parametrize("count, memorized", [(3, 1), (8, 4), (11, 5), (18, 8), (40, 8)])
def test_a_sample_is_the_same_in_any_order_and_memorized_up_to_a_half(count, memorized):
    frame = pd.DataFrame({"prompt": [f"prompt {i}" for i in range(20)], "label": [1, 0, 1, 0, 1] * 4}).iloc[:20]
    frame.loc[frame["prompt"].isin(["prompt 0", "prompt 2", "prompt 4", "prompt 5"]), "label"] = 0
    whole = listed(frame)
    some = sample(whole, count).frame
    assert len(some) == min(count, 20) and some["label"].sum() == memorized
    assert some["prompt"].tolist() == [p for p in frame["prompt"] if p in set(some["prompt"])]  # in the list's order
    turned = sample(listed(frame.iloc[::-1]), count).frame
    assert set(turned["prompt"]) == set(some["prompt"])
    assert sample(whole, count).hashes != whole.hashes


def test_a_sample_without_labels():
    prompts = [f"prompt {i}" for i in range(9)]
    few, more = (set(sample(listed(prompts), count).frame["prompt"]) for count in (2, 4))
    assert len(few) == 2 and few < more
