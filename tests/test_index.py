"""The index of training pictures."""

import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import GOLDEN, load_tiny
from faults import refused
from PIL import Image

from memorization.cli import index as command
from memorization.errors import InputError
from memorization.index import build as build_module
from memorization.index import compress as compress_module
from memorization.index import imported, store
from memorization.index.build import build_index
from memorization.index.imported import import_embeddings
from memorization.index.shards import Shard, merge
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
            "no config.json in this folder; a AutoencoderKL",
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


# ---------------------------------------------------------------- shards
ONLY = ("items.jsonl", "features.bin", "index.json")


def shard_of(source, out, number, of, kind="pixels", size=(8, 8), model=None):
    build_index(source, out, kind, size, model, at_once=4, shard=Shard(number, of))
    return out


@pytest.mark.parametrize(
    ("kind", "size", "model"), [("pixels", (8, 8), None), ("latents", (16, 16), str(GOLDEN / "tiny-eps"))]
)
def test_merged_shards_have_the_bytes_of_one_build(folder, tmp_path, capsys, kind, size, model):
    (folder / "05.png").write_bytes(b"no picture")
    rows = [{"image": f"pictures/{i:02d}.png", "prompt": f"thing {i}"} for i in [*range(12), 3, 0]]  # some come twice
    listed = tmp_path / "list.csv"
    pd.DataFrame(rows).to_csv(listed, index=False)
    build_index(listed, tmp_path / "whole", kind, size, model, at_once=4)
    shards = [shard_of(listed, tmp_path / f"part-{i}", i, 2, kind, size, model) for i in (1, 2)]
    assert [len(Index(part)) for part in shards] == [4, 7]
    assert len(merge(shards[::-1], tmp_path / "merged")) == 11
    for name in ONLY:
        assert (tmp_path / "merged" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert {path.name for path in (tmp_path / "merged").iterdir()} == set(ONLY)
    assert len(build_index(listed, tmp_path / "merged", kind, size, model)) == 11  # it is an index like any other


def test_shards_that_are_no_whole(folder, tmp_path):
    one, two, three = (shard_of(folder, tmp_path / f"part-{i}", i, 3) for i in (1, 2, 3))
    again = shard_of(folder, tmp_path / "again", 2, 3)
    larger = shard_of(folder, tmp_path / "larger", 2, 3, size=(4, 4))
    half = shard_of(folder, tmp_path / "half", 2, 2)
    plain = tmp_path / "plain"
    build_index(folder, plain, "pixels", (8, 8))
    for given, said in (
        ([one, three], ("shards 2 of 3 are missing",)),
        ([two], ("shards 1, 3 of 3 are missing",)),
        ([one, two, again, three], ("shard 2/3 is given twice", "part-2", "again")),
        ([one, larger, three], ("larger: shard 2/3 is of other settings (size: [4, 4] there, [8, 8] in",)),
        ([one, half], ("half: is shard 2/2, but", "shard 1/3")),
        ([one, two, plain], ("plain: holds no shard",)),
        ([one, two, tmp_path / "nothing"], ("nothing: holds no shard",)),
    ):
        refused(lambda given=given: merge(given, tmp_path / "merged"), *said)
    assert not (tmp_path / "merged").exists()
    refused(lambda: merge([one, two, three], plain), "plain: holds an index already")
    Image.new("RGB", (16, 16)).save(folder / "12.png")
    (folder / "metadata.jsonl").unlink()
    other = shard_of(folder, tmp_path / "other", 3, 3)
    refused(lambda: merge([one, two, other], tmp_path / "merged"), "other: shard 3/3 is of another list")
    for cut, said in (("items.jsonl", "build it again"), ("features.bin", "cut short")):
        whole = (two / cut).read_bytes()
        (two / cut).write_bytes(whole[:-5])
        refused(lambda: merge([one, two, three], tmp_path / "merged"), "part-2", said)
        (two / cut).write_bytes(whole)
    assert not (tmp_path / "merged" / "index.json").exists() and not list((tmp_path / "merged").glob("*.part"))
    assert len(merge([one, two, three], tmp_path / "merged")) == 12


def test_a_killed_shard_is_not_merged_and_goes_on(folder, tmp_path, monkeypatch):
    one = shard_of(folder, tmp_path / "part-1", 1, 2)
    with monkeypatch.context() as patched:
        patched.setattr(build_module, "_readable", lambda items, size: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            shard_of(folder, tmp_path / "part-2", 2, 2)
    refused(
        lambda: merge([one, tmp_path / "part-2"], tmp_path / "merged"), "part-2: shard 2/2 was not built to its end"
    )
    for number, of in ((1, 2), (2, 3)):
        refused(lambda n=number, of=of: shard_of(folder, tmp_path / "part-2", n, of),
                f"holds shard 2/2, not this shard {number}/{of}")  # fmt: skip
    refused(lambda: build_index(folder, one, "pixels", (8, 8)), "part-1: holds shard 1/2 of an index")
    build_index(folder, tmp_path / "whole", "pixels", (8, 8))
    refused(lambda: shard_of(folder, tmp_path / "whole", 1, 2), "whole: holds an index that is no shard")
    merge([one, shard_of(folder, tmp_path / "part-2", 2, 2)], tmp_path / "merged")
    assert (tmp_path / "merged" / "features.bin").read_bytes() == (tmp_path / "whole" / "features.bin").read_bytes()


def test_commands_of_shards(run_script, folder, tmp_path, capsys):
    parts = []
    for i in range(12, 70):
        (folder / f"{i:02d}.png").write_bytes((folder / f"{i % 12:02d}.png").read_bytes())
    (folder / "metadata.jsonl").unlink()
    for i in (1, 2):
        parts.append(tmp_path / f"part-{i}")
        run_script(command, "build", folder, "--out", parts[-1], "--size", 8, 8, "--shard", f"{i}/2")
    run_script(command, "merge", *parts, "--out", tmp_path / "merged")
    out = capsys.readouterr().out.splitlines()
    assert [line.split(": ")[1] for line in out] == [
        "64 pictures, pixels, shard 1/2", "6 pictures, pixels, shard 2/2", "70 pictures, pixels",
    ]  # fmt: skip
    for text in ("0/2", "3/2", "2", "a/b", "1/0"):
        refused(lambda text=text: run_script(command, "build", folder, "--out", tmp_path, "--shard", text),
                f"{text} is no shard I/K")  # fmt: skip
    refused(lambda: run_script(command, "build", folder, "--out", tmp_path / "x", "--shard", "1/3"),
            "70 pictures are 2 batches of 64, too few for 3 shards")  # fmt: skip


# ---------------------------------------------------------------- embeddings of other programs
CLIP = str(GOLDEN.parent.parent / "testbed" / "models" / "clip")


@pytest.fixture
def width(monkeypatch):
    """Of a model's embeddings, which is not there: eight."""
    record = {"kind": "clip", "size": None, "width": 8, "model": CLIP, "revision": "some"}
    monkeypatch.setattr(imported, "description", lambda *_: (None, record))
    return 8


def embedded(folder, counts, width, home="img_emb", name="img_emb_{}.npy"):
    """Arrays of half precision, as clip-retrieval writes them; all their rows."""
    (folder / home).mkdir(parents=True, exist_ok=True)
    rows = np.random.default_rng(0).normal(size=(sum(counts), width)).astype(np.float16)
    for number, part in enumerate(np.split(rows, np.cumsum(counts)[:-1])):
        np.save(folder / home / name.format(number), part)
    return rows


def tell(folder, counts, name="metadata/metadata_{}.jsonl"):
    first = 0
    for number, count in enumerate(counts):
        path = folder / name.format(number)
        path.parent.mkdir(exist_ok=True)
        rows = [{"image_path": f"/far/{i}.jpg", "caption": f"thing {i}"} for i in range(first, first + count)]
        frame = pd.DataFrame(rows)
        if path.suffix == ".csv":
            frame.to_csv(path, index=False)
        else:
            frame.to_json(path, orient="records", lines=True)
        first += count


@pytest.mark.parametrize("table", ["metadata/metadata_{}.jsonl", "metadata/metadata_{}.csv", "img_emb/{}.csv"])
def test_embeddings_of_clip_retrieval(run_script, tmp_path, capsys, width, table):
    counts = [3, 2, 1, 1, 1, 1, 1, 1, 1, 1, 4]  # the tenth comes after the ninth
    rows = embedded(tmp_path / "made", counts, width).astype(np.float32)
    tell(tmp_path / "made", counts, table)
    run_script(command, "import", tmp_path / "made", "--model", CLIP, "--out", tmp_path / "index")
    assert "index: 17 pictures, clip" in capsys.readouterr().out
    index = Index(tmp_path / "index")
    assert index.kind == "clip" and index.model == CLIP and index.revision == "some"
    assert index.captions == [f"thing {i}" for i in range(17)] and index.paths[16] == "/far/16.jpg"
    expected = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    assert np.allclose(index.features, expected, atol=1e-6)


def test_the_model_describes_what_is_searched_for(folder, tmp_path):
    built = build_index(folder, tmp_path / "built", "clip", None, CLIP)
    (tmp_path / "made").mkdir()
    np.save(tmp_path / "made" / "some.npy", 3 * built.features[:])
    frame = pd.DataFrame({"image_path": built.paths, "caption": built.captions})
    frame.to_csv(tmp_path / "made" / "some.csv", index=False)
    index = import_embeddings(tmp_path / "made", tmp_path / "index", "clip", CLIP)
    assert (tmp_path / "index" / "index.json").read_bytes() == (tmp_path / "built" / "index.json").read_bytes()
    picture = to_tensor(read_picture(folder / "07.png", None)[None])
    distance, rows = index.search(index.describe(picture), 1)
    assert rows.tolist() == [[7]] and distance.item() == pytest.approx(0, abs=1e-5) and index.captions[7] == "thing 7"


def test_tables_of_img2dataset(tmp_path, width):
    embedded(tmp_path, [2], width, home=".", name="embeddings.npy")
    rows = [{"url": "http://a", "key": "000", "caption": "one", "status": "success"},
            {"url": "http://b", "key": "001", "caption": "gone", "status": "failed_to_download"},
            {"url": "http://c", "key": "002", "caption": None, "status": "success"}]  # fmt: skip
    pd.DataFrame(rows).to_json(tmp_path / "00000.jsonl", orient="records", lines=True)
    index = import_embeddings(tmp_path, tmp_path / "index", "clip", CLIP)
    assert index.paths == ["http://a", "http://c"] and index.captions == ["one", ""]


def test_parquet(tmp_path, width):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = embedded(tmp_path, [2, 1], width)
    (tmp_path / "metadata").mkdir()
    for number, names in enumerate((["a", "b"], ["c"])):
        table = pyarrow.table({"image_path": names, "caption": [f"a {name}" for name in names], "other": names})
        parquet.write_table(table, tmp_path / "metadata" / f"metadata_{number}.parquet")
    index = import_embeddings(tmp_path, tmp_path / "index", "clip", CLIP)
    assert index.paths == ["a", "b", "c"] and index.captions == ["a a", "a b", "a c"] and len(rows) == 3
    (tmp_path / "metadata" / "metadata_1.parquet").write_bytes(b"PAR1 nonsense")
    refused(lambda: import_embeddings(tmp_path, tmp_path / "other", "clip", CLIP), "metadata_1.parquet")


def test_parquet_without_its_library(tmp_path, width, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    embedded(tmp_path, [2], width)
    (tmp_path / "metadata").mkdir()
    (tmp_path / "metadata" / "metadata_0.parquet").write_bytes(b"PAR1")
    refused(lambda: import_embeddings(tmp_path, tmp_path / "index", "clip", CLIP), "metadata_0.parquet: needs pyarrow")
    assert not (tmp_path / "index" / "index.json").exists()


def test_embeddings_that_do_not_fit(tmp_path, width):
    def saying(damage, *said):
        place = tmp_path / str(len(list(tmp_path.iterdir())))
        rows = embedded(place, [2, 1], width)
        tell(place, [2, 1])
        damage(place, rows)
        refused(lambda: import_embeddings(place, place / "index", "clip", CLIP), *said)
        assert not (place / "index" / "items.jsonl").exists()

    array, table = "img_emb/img_emb_1.npy", "metadata/metadata_1.jsonl"
    broken = np.full((1, width), np.nan, np.float32)
    saying(lambda place, rows: np.save(place / array, rows[:2]), "img_emb_1.npy: 2 rows", "tells of 1")
    saying(lambda place, rows: np.save(place / array, rows[:1, :-1]), "img_emb_1.npy", f"rows of {width - 1} numbers")
    saying(lambda place, rows: np.save(place / array, broken), "img_emb_1.npy: row 0 has no direction")
    saying(lambda place, rows: np.save(place / array, 0 * rows[:1]), "img_emb_1.npy: row 0 has no direction")
    saying(lambda place, rows: np.save(place / array, np.array([{}])), "img_emb_1.npy", "is no array")
    saying(lambda place, rows: np.save(place / array, np.arange(4)), "img_emb_1.npy", "no rows of floating")
    saying(lambda place, rows: (place / array).write_bytes(b"x"), "img_emb_1.npy", "is no array")
    saying(lambda place, rows: (place / table).unlink(), "img_emb_1.npy: no .jsonl has its number")
    saying(lambda place, rows: np.save(place / "img_emb" / "other_1.npy", rows), "two files bear the same number")
    saying(lambda place, rows: (tell(place, [2, 1, 1]), 0), "metadata_2.jsonl: no .npy has its number")
    saying(lambda place, rows: (place / table).write_text('{"caption": "a"}\n'), "no column names the pictures")
    saying(lambda place, rows: (place / table).write_text("{broken\n"), "line 1: not a JSON object")
    saying(lambda place, rows: (place / table).write_bytes(b"\xff\n"), "byte 0 is not UTF-8")
    refused(lambda: import_embeddings(tmp_path / "nothing", tmp_path / "x", "clip", CLIP), "holds no .npy")
    embedded(tmp_path / "alone", [2], width)
    refused(lambda: import_embeddings(tmp_path / "alone", tmp_path / "x", "clip", CLIP), "tells of the pictures")


# ---------------------------------------------------------------- FAISS
def clustered(count, width=32):
    """Unit vectors round a hundred centres."""
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(100, width))[rng.integers(100, size=count)] + 0.3 * rng.normal(size=(count, width))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def test_approximate_search_finds_nearly_all_and_its_distances_are_exact(run_script, tmp_path, monkeypatch):
    pytest.importorskip("faiss")
    vectors = clustered(12_000)
    vectors.tofile(tmp_path / "features.bin")
    (tmp_path / "items.jsonl").write_text("".join(f'{{"path": "{i}", "caption": ""}}\n' for i in range(len(vectors))))
    (tmp_path / "index.json").write_text('{"kind": "sscd", "size": null, "width": 32}')
    queries = torch.from_numpy(vectors[::600])
    _, rows = Index(tmp_path).search(queries, 10)
    run_script(command, "compress", tmp_path, "--lists", 100, "--code", 16)
    made = Index(tmp_path)
    plain = made.digest
    approximate, near = made.search(queries, 10)
    recall = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(rows.tolist(), near.tolist(), strict=True)])
    assert made.candidates and recall > 0.9
    expected = 1 - (queries[:, None] * torch.from_numpy(vectors)[near]).sum(2)
    assert torch.allclose(approximate, expected, atol=1e-6) and (near[:, 0] == rows[:, 0]).all()
    monkeypatch.setattr(compress_module, "AT_ONCE", 1000)
    run_script(command, "compress", tmp_path, "--lists", 100, "--code", 16, "--on-disk")
    (moved,) = tmp_path.rename(tmp_path.with_name("moved")).glob("ivfpq.ivfdata")  # the lists are found beside it
    on_disk = Index(moved.parent)
    assert all(map(torch.equal, on_disk.search(queries, 10), (approximate, near))) and on_disk.digest != plain
    compress_module.compress(Index(moved.parent), moved.parent, 100, 16, on_disk=True, block=5000)
    assert all(map(torch.equal, Index(moved.parent).search(queries, 10), (approximate, near)))
    moved.parent.rename(tmp_path)
    assert not list(tmp_path.glob("*.parts"))
    for arguments, message in (
        (("--lists", 5000, "--code", 16), "too few for 5000 lists"),
        (("--code", 7), "no divisor"),
    ):
        with pytest.raises(InputError, match=message):
            run_script(command, "compress", tmp_path, *arguments)
