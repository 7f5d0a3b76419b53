"""The index of training pictures."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import GOLDEN, load_tiny
from PIL import Image

from memorization.cli import index as command
from memorization.errors import InputError
from memorization.index import store
from memorization.index.build import build_index
from memorization.index.store import Index
from memorization.io.pictures import read_picture, to_tensor
from memorization.similarity.nl2 import l2


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
    monkeypatch.setattr(store, "CHUNK", 5 * 4 * 192)  # five rows; the result must not depend on it
    made = build_index(folder, tmp_path / "index", "pixels", (8, 8))
    distance, rows = made.search(queries(), 4)
    table = l2(queries().unflatten(1, (3, 8, 8)), made.vectors(slice(None)).unflatten(1, (3, 8, 8)))
    expected, order = table.topk(4, largest=False)
    assert torch.equal(rows, order) and torch.allclose(distance, expected, atol=1e-5)
    own, place = made.search(made.vectors([7]), 20)
    assert place.shape == (1, 12) and place[0, 0] == 7 and own[0, 0] == 0


def test_captions_and_how_often_they_occur(folder, tmp_path):
    made = build_index(folder, tmp_path / "index", "pixels", (8, 8))
    assert made.captions[3] == "same" and made.captions[4] == "thing 4"
    assert made.multiplicity(torch.tensor([[0, 3, 6, 1], [1, 0, 3, 2]])) == [3, 1]


def test_building_goes_on_where_it_stopped_and_adds_what_is_new(folder, tmp_path, capsys):
    whole = build_index(folder, tmp_path / "whole", "pixels", (8, 8))
    killed = tmp_path / "killed"
    build_index(folder, killed, "pixels", (8, 8), at_once=4)
    items = (killed / "items.jsonl").read_bytes().splitlines(keepends=True)
    (killed / "items.jsonl").write_bytes(b"".join(items[:4]) + items[4][:7])  # torn
    with pytest.raises(InputError, match="another kind, size or network"):
        build_index(folder, killed, "pixels", (4, 4))
    again = build_index(folder, killed, "pixels", (8, 8), at_once=4)
    assert again.paths == whole.paths and np.array_equal(again.features, whole.features)

    (folder / "broken.png").write_bytes(b"no picture")
    (folder / "metadata.jsonl").unlink()
    assert len(build_index(folder, killed, "pixels", (8, 8))) == 12
    assert "skipped" in capsys.readouterr().err


def test_a_picture_is_a_file_whatever_it_is_called(folder, tmp_path, monkeypatch):
    made = build_index(folder, tmp_path / "index", "pixels", (8, 8))
    monkeypatch.chdir(tmp_path)
    assert len(build_index(folder.relative_to(tmp_path), tmp_path / "index", "pixels", (8, 8))) == len(made) == 12
    other = tmp_path / "other"  # its pictures have the same names
    other.mkdir()
    Image.new("RGB", (16, 16)).save(other / "00.png")
    assert len(build_index(other, tmp_path / "index", "pixels", (8, 8))) == 13


def test_a_short_file_of_features_is_said_and_made_whole(folder, tmp_path):
    build_index(folder, tmp_path / "index", "pixels", (8, 8))
    path = tmp_path / "index" / "features.bin"
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(InputError, match="is missing or cut short"):
        Index(tmp_path / "index")
    mended, whole = (build_index(folder, tmp_path / name, "pixels", (8, 8)) for name in ("index", "whole"))
    assert torch.equal(mended.vectors(slice(None)), whole.vectors(slice(None))) and mended.paths == whole.paths


def test_captions_with_line_separators(folder, tmp_path):
    (folder / "metadata.jsonl").unlink()
    listed = tmp_path / "list.jsonl"
    pd.DataFrame([{"prompt": "one\u2028line", "image": "pictures/00.png"}]).to_json(
        listed, orient="records", lines=True
    )
    assert build_index(listed, tmp_path / "index", "pixels", (8, 8)).captions == ["one\u2028line"]


def test_commands(run_script, folder, tmp_path, capsys):
    listed = tmp_path / "list.csv"
    pd.DataFrame({"prompt": ["one", "two"], "image": ["pictures/00.png", "pictures/01.png"]}).to_csv(
        listed, index=False
    )
    run_script(command, "build", listed, "--out", tmp_path / "index", "--size", 8, 8)
    assert "2 pictures" in capsys.readouterr().out
    run_script(command, "search", tmp_path / "index", listed, folder / "01.png", "-k", 1)
    out, err = capsys.readouterr()
    assert "01.png\n  0.000  pictures/01.png  two" in out and "list.csv" in err and "list.csv" not in out
    assert "The caption" not in out
    run_script(command, "build", folder, "--out", tmp_path / "more", "--size", 8, 8)
    run_script(command, "search", tmp_path / "more", folder / "03.png", "-k", 12)
    assert "The caption of the first is that of 4 of these 12." in capsys.readouterr().out
    for arguments, message in (
        (("search", tmp_path, folder / "01.png"), "holds no index"),
        (("search", tmp_path / "index", listed), "none of the pictures can be read"),
        (("search", tmp_path / "index", folder / "01.png", "-k", 0), "argument -k: 0 is no whole number of at least 1"),
        (("build", tmp_path / "nothing", "--out", tmp_path / "other"), "no such file"),
        (
            ("build", listed, "--out", tmp_path / "other", "--size", 0, 0),
            "--size: 0 is no whole number",
        ),
        (("build", listed, "--out", tmp_path / "other", "--features", "clip"), "and --model, go together"),
        (
            ("build", listed, "--out", tmp_path / "other", "--features", "latents", "--model", tmp_path),
            "no autoencoder",
        ),
    ):
        with pytest.raises(InputError, match=message):
            run_script(command, *arguments)
    assert isinstance(Index(tmp_path / "index"), Index)


def test_latents_are_those_of_the_autoencoder(folder, tmp_path):
    made = build_index(folder, tmp_path / "index", "latents", (16, 16), str(GOLDEN / "tiny-eps"))
    pipe = load_tiny("tiny-eps", pictures=True)
    with torch.no_grad():
        pictures = to_tensor(np.stack([read_picture(Path(path), (16, 16)) for path in made.paths]))
        expected = pipe.vae.encode(pictures).latent_dist.mean * pipe.vae.config.scaling_factor
    assert torch.allclose(made.vectors(slice(None)), expected.flatten(1), atol=1e-5)
    assert made.search(made.vectors([1]), 1)[1].tolist() == [[1]]


def clustered(count, width=32):
    """Unit vectors round a hundred centres."""
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(100, width))[rng.integers(100, size=count)] + 0.3 * rng.normal(size=(count, width))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def test_approximate_search_finds_nearly_all_and_its_distances_are_exact(run_script, tmp_path, capsys):
    pytest.importorskip("faiss")
    vectors = clustered(12_000)
    vectors.tofile(tmp_path / "features.bin")
    (tmp_path / "items.jsonl").write_text("".join(f'{{"path": "{i}", "caption": ""}}\n' for i in range(len(vectors))))
    (tmp_path / "index.json").write_text('{"kind": "sscd", "size": null, "width": 32}')
    queries = torch.from_numpy(vectors[::600])
    _, rows = Index(tmp_path).search(queries, 10)
    run_script(command, "compress", tmp_path, "--lists", 100, "--code", 16)
    made = Index(tmp_path)
    approximate, near = made.search(queries, 10)
    recall = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(rows.tolist(), near.tolist(), strict=True)])
    assert made.candidates and recall > 0.9
    expected = 1 - (queries[:, None] * torch.from_numpy(vectors)[near]).sum(2)
    assert torch.allclose(approximate, expected, atol=1e-6) and (near[:, 0] == rows[:, 0]).all()
    for arguments, message in (
        (("--lists", 5000, "--code", 16), "too few for 5000 lists"),
        (("--code", 7), "no divisor"),
    ):
        with pytest.raises(InputError, match=message):
            run_script(command, "compress", tmp_path, *arguments)
