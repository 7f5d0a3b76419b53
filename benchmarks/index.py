#!/usr/bin/env python
"""An index of training pictures: building it, merging its shards, and searching in it by its size, 64 queries at once.

python benchmarks/index.py                          10,000 and 100,000 made-up SSCD-like features; 256 pictures built
python benchmarks/index.py --sizes 10000 100000 1000000 --build 0 --out results/speed
python benchmarks/index.py --sizes 1000000 --build 0 --on-disk      the compressed lists are left on disk

Each step is a process of its own, so that its peak of memory is its own; pages of the index that the system keeps in
memory, and gives away when others need it, count among it. Search is exact, and by FAISS if that is installed; recall
is that of FAISS against exact search. Pictures are JPEG files of 512 x 512; features are made by the shipped testbed's
networks (latents, clip), and by SSCD if its weights are there.
"""

from __future__ import annotations

import json
import multiprocessing
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from memorization.errors import InputError  # noqa: E402
from memorization.flags import ArgumentParser, run_script  # noqa: E402
from memorization.index.approximate import LISTS, NAME  # noqa: E402
from memorization.index.build import build_index  # noqa: E402
from memorization.index.compress import compress  # noqa: E402
from memorization.index.kinds import FEATURES, SIZED  # noqa: E402
from memorization.index.shards import Shard, merge  # noqa: E402
from memorization.index.store import Index  # noqa: E402
from memorization.io.files import write_atomically  # noqa: E402
from memorization.io.tables import markdown  # noqa: E402

WIDTH, QUERIES, K = 512, 64, 50


def write_shards(folder: Path, count: int, shards: int = 4) -> list[Path]:
    """Unit vectors round a thousand centres, in so many shards."""
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(1000, WIDTH)).astype(np.float32)
    folders = []
    for number in range(1, shards + 1):
        own = range(count * (number - 1) // shards, count * number // shards)
        place = folder / f"shard-{number}"
        place.mkdir()
        with open(place / "features.bin", "wb") as file:
            for start in own[::50_000]:
                size = min(50_000, own.stop - start)
                part = centres[rng.integers(1000, size=size)] + 0.7 * rng.normal(size=(size, WIDTH)).astype(np.float32)
                (part / np.linalg.norm(part, axis=1, keepdims=True)).astype(np.float32).tofile(file)
        lines = (json.dumps({"path": str(i), "caption": ""}) + "\n" for i in own)
        (place / "items.jsonl").write_text("".join(lines), encoding="utf-8")
        (place / "index.json").write_text(json.dumps({"kind": "sscd", "size": None, "width": WIDTH}), encoding="utf-8")
        Shard(number, shards, "made-up", count, len(own)).save(place)
        folders.append(place)
    return folders


def seconds(work: Callable) -> tuple[float, object]:
    started = time.perf_counter()
    result = work()
    return time.perf_counter() - started, result


def _alone(work: Callable) -> tuple[float, object, float]:
    took, result = seconds(work)
    return took, result, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def alone(work: Callable) -> tuple[float, object, float]:
    """Seconds, what ``work`` gave, and the peak of memory in GiB, in a process of its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_alone, work).result()


def merged(folders: list[Path], out: Path) -> None:
    merge(folders, out)


def compressed(folder: Path, on_disk: bool) -> int:
    """Bytes of the inverted file."""
    compress(Index(folder, approximately=False), folder, on_disk=on_disk)
    return sum(path.stat().st_size for path in (folder / NAME, folder / LISTS) if path.exists())


def searched(folder: Path, approximately: bool) -> tuple[float, float, np.ndarray]:
    """Seconds of opening and of searching, and the rows that were found."""
    opening, index = seconds(lambda: Index(folder, approximately=approximately))
    noise = torch.randn(QUERIES, WIDTH, generator=torch.Generator().manual_seed(0))
    queries = index.vectors(slice(0, len(index), len(index) // QUERIES))[:QUERIES]
    took, (_, rows) = seconds(lambda: index.search(torch.nn.functional.normalize(queries + 0.02 * noise, dim=1), K))
    return opening, took, rows.numpy()


def measure(size: int, on_disk: bool) -> dict:
    """A row of the table."""
    with tempfile.TemporaryDirectory() as name:
        index = Path(name) / "index"
        merging, _, _ = alone(partial(merged, write_shards(Path(name), size), index))
        _, (opening, exact, true), of_exact = alone(partial(searched, index, False))
        row = {"pictures": size, "merging, s": merging, "opening, s": opening, "exact, s": exact,
               "exact, GiB": of_exact}  # fmt: skip
        try:
            packing, size_packed, of_packing = alone(partial(compressed, index, on_disk))
            _, (_, near, found), of_near = alone(partial(searched, index, True))
        except InputError as error:
            print(error, file=sys.stderr)
            return row
        recall = np.mean([len(set(a) & set(b)) / K for a, b in zip(true.tolist(), found.tolist(), strict=True)])
        return row | {
            "compress, s": packing, "compress, GiB": of_packing, "compressed, MB": size_packed / 1e6, "FAISS, s": near,
            "FAISS, GiB": of_near, f"recall of {K}": recall, "recall@1": (true[:, 0] == found[:, 0]).mean(),
        }  # fmt: skip


def build_times(count: int) -> pd.DataFrame:
    """Seconds and bytes a picture, for every kind of features that can be had."""
    models = {"latents": str(ROOT / "testbed/models/testbed-eps"), "clip": str(ROOT / "testbed/models/clip")}
    rng, rows = np.random.default_rng(0), []
    with tempfile.TemporaryDirectory() as name:
        pictures = Path(name) / "pictures"
        pictures.mkdir()
        for i in range(count):
            small = Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8))
            small.resize((512, 512), Image.Resampling.BICUBIC).save(pictures / f"{i:06d}.jpg")
        for kind in FEATURES:
            size = (64, 64) if kind in SIZED else None
            try:
                took, index = seconds(lambda k=kind, s=size: build_index(pictures, Path(name) / k, k, s, models.get(k)))
            except InputError as error:
                print(error, file=sys.stderr)
                continue
            row = index.features[0].nbytes
            rows.append(
                {"features": kind, "pictures": count, "ms a picture": 1000 * took / count, "bytes a picture": row}
            )
    return pd.DataFrame(rows)


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--build", type=int, default=256, metavar="N", help="pictures; 0: none (default: %(default)s)")
    parser.add_argument("--on-disk", action="store_true", help="compress with the lists on disk")
    parser.add_argument("--out", type=Path, metavar="DIR", help="keep both tables there")
    args = parser.parse_args()
    if min(args.sizes) < QUERIES:
        parser.error(f"--sizes are at least {QUERIES}")
    tables = {"index.csv": pd.DataFrame([measure(size, args.on_disk) for size in args.sizes]).round(3)}
    if args.build:
        tables["index_build.csv"] = build_times(args.build).round(2)
    for name, table in tables.items():
        print(markdown(table) + "\n")
        if args.out:
            write_atomically(args.out / name, table.to_csv(index=False))


if __name__ == "__main__":
    run_script(main)
