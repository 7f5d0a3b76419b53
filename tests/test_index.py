"""The index of training pictures."""

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from memorization import index
from memorization.errors import InputError
from memorization.index import Index, build
from memorization.similarity.pixel import l2


@pytest.fixture
def folder(tmp_path):
    """Twelve pictures; every third has the same caption."""
    rng = np.random.default_rng(0)
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for i in range(12):
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(pictures / f"{i:02d}.png")
    rows = [{"file_name": f"{i:02d}.png", "prompt": "same" if i % 3 == 0 else f"thing {i}"} for i in range(12)]
    pd.DataFrame(rows).to_json(pictures / "metadata.jsonl", orient="records", lines=True)
    return pictures


def queries(count=3):
    return torch.rand(count, 3 * 8 * 8, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_search_is_brute_force(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(index, "CHUNK", 5 * 4 * 192)  # five rows; the result must not depend on it
    made = build(folder, tmp_path / "index", "pixels", (8, 8))
    distance, rows = made.search(queries(), 4)
    table = l2(queries().unflatten(1, (3, 8, 8)), made.vectors(slice(None)).unflatten(1, (3, 8, 8)))
    expected, order = table.topk(4, largest=False)
    assert torch.equal(rows, order) and torch.allclose(distance, expected, atol=1e-5)
    own, place = made.search(made.vectors([7]), 20)
    assert place.shape == (1, 12) and place[0, 0] == 7 and own[0, 0] == 0


def test_captions_and_how_often_they_occur(folder, tmp_path):
    made = build(folder, tmp_path / "index", "pixels", (8, 8))
    assert made.captions[3] == "same" and made.captions[4] == "thing 4"
    assert made.multiplicity(torch.tensor([[0, 3, 6, 1], [1, 0, 3, 2]])) == [3, 1]


def test_building_goes_on_where_it_stopped_and_adds_what_is_new(folder, tmp_path, capsys):
    whole = build(folder, tmp_path / "whole", "pixels", (8, 8))
    killed = tmp_path / "killed"
    build(folder, killed, "pixels", (8, 8), at_once=4)
    items = (killed / "items.jsonl").read_bytes().splitlines(keepends=True)
    (killed / "items.jsonl").write_bytes(b"".join(items[:4]) + items[4][:7])  # torn
    with pytest.raises(InputError, match="another kind or size"):
        build(folder, killed, "pixels", (4, 4))
    again = build(folder, killed, "pixels", (8, 8), at_once=4)
    assert again.paths == whole.paths and np.array_equal(again.features, whole.features)

    (folder / "broken.png").write_bytes(b"no picture")
    (folder / "metadata.jsonl").unlink()
    assert len(build(folder, killed, "pixels", (8, 8))) == 12
    assert "skipped" in capsys.readouterr().err


def test_captions_with_line_separators(folder, tmp_path):
    (folder / "metadata.jsonl").unlink()
    listed = tmp_path / "list.jsonl"
    pd.DataFrame([{"prompt": "one\u2028line", "image": "pictures/00.png"}]).to_json(
        listed, orient="records", lines=True
    )
    assert build(listed, tmp_path / "index", "pixels", (8, 8)).captions == ["one\u2028line"]


def test_commands(run_script, folder, tmp_path, capsys):
    listed = tmp_path / "list.csv"
    pd.DataFrame({"prompt": ["one", "two"], "image": ["pictures/00.png", "pictures/01.png"]}).to_csv(
        listed, index=False
    )
    run_script(index, "build", listed, "--out", tmp_path / "index", "--size", 8, 8)
    assert "2 pictures" in capsys.readouterr().out
    run_script(index, "search", tmp_path / "index", listed, folder / "01.png", "-k", 1)
    out, err = capsys.readouterr()
    assert "01.png\n  0.000  pictures/01.png  two" in out and "list.csv" in err and "list.csv" not in out
    for arguments, message in (
        (("search", tmp_path, folder / "01.png"), "holds no index"),
        (("search", tmp_path / "index", listed), "none of the pictures can be read"),
        (("search", tmp_path / "index", folder / "01.png", "-k", 0), "-k is at least 1"),
        (("build", tmp_path / "nothing", "--out", tmp_path / "other"), "no such file"),
        (("build", listed, "--out", tmp_path / "other", "--size", 0, 0), "at least 1 1"),
    ):
        with pytest.raises(InputError, match=message):
            run_script(index, *arguments)
    assert isinstance(Index(tmp_path / "index"), Index)
