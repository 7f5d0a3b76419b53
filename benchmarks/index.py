#!/usr/bin/env python
"""An index of training pictures: building it, and searching in it by its size, 64 queries at once.

python benchmarks/index.py                          10,000 and 100,000 made-up SSCD-like features; 256 pictures built
python benchmarks/index.py --sizes 1000000 --build 0

Search is exact, and by FAISS if that is installed. Pictures are JPEG files of 512 x 512; features are made by the
shipped testbed's networks (latents, clip), and by SSCD if its weights are there.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from memorization.errors import InputError  # noqa: E402
from memorization.flags import ArgumentParser, run_script  # noqa: E402
from memorization.index.approximate import NAME  # noqa: E402
from memorization.index.build import build_index  # noqa: E402
from memorization.index.compress import compress  # noqa: E402
from memorization.index.kinds import FEATURES, SIZED  # noqa: E402
from memorization.index.store import Index  # noqa: E402
from memorization.io.files import write_atomically  # noqa: E402
from memorization.io.tables import markdown  # noqa: E402

WIDTH, QUERIES, K = 512, 64, 50


def write_features(folder: Path, count: int) -> None:
    """Unit vectors round a thousand centres."""
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(1000, WIDTH)).astype(np.float32)
    with open(folder / "features.bin", "wb") as file:
        for start in range(0, count, 50_000):
            size = min(50_000, count - start)
            part = centres[rng.integers(1000, size=size)] + 0.7 * rng.normal(size=(size, WIDTH)).astype(np.float32)
            (part / np.linalg.norm(part, axis=1, keepdims=True)).astype(np.float32).tofile(file)
    lines = (json.dumps({"path": str(i), "caption": ""}) + "\n" for i in range(count))
    (folder / "items.jsonl").write_text("".join(lines), encoding="utf-8")
    (folder / "index.json").write_text(json.dumps({"kind": "sscd", "size": None, "width": WIDTH}), encoding="utf-8")


def seconds(work) -> tuple[float, object]:
    started = time.perf_counter()
    result = work()
    return time.perf_counter() - started, result


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
    parser.add_argument("--out", type=Path, metavar="DIR", help="keep both tables there")
    args = parser.parse_args()
    if min(args.sizes) < QUERIES:
        parser.error(f"--sizes are at least {QUERIES}")
    rows = []
    for size in args.sizes:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            write_features(folder, size)
            opening, index = seconds(lambda folder=folder: Index(folder))
            noise = torch.randn(QUERIES, WIDTH, generator=torch.Generator().manual_seed(0))
            queries = index.vectors(slice(0, size, size // QUERIES))[:QUERIES]
            queries = torch.nn.functional.normalize(queries + 0.02 * noise, dim=1)
            exact, (_, true) = seconds(lambda index=index, queries=queries: index.search(queries, K))
            row = {"pictures": size, "opening, s": opening, "exact, s": exact}
            try:
                packing, _ = seconds(lambda index=index, folder=folder: compress(index, folder))
                packed = Index(folder)
                near, (_, found) = seconds(lambda packed=packed, queries=queries: packed.search(queries, K))
                recall = np.mean([len(set(a) & set(b)) / K for a, b in zip(true.tolist(), found.tolist(), strict=True)])
                row |= {"compress, s": packing, "compressed, MB": (folder / NAME).stat().st_size / 1e6,
                        "FAISS, s": near, f"recall of {K}": recall,
                        "nearest found": (true[:, 0] == found[:, 0]).float().mean().item()}  # fmt: skip
            except InputError as error:
                print(error, file=sys.stderr)
            rows.append(row)
    tables = {"index.csv": pd.DataFrame(rows).round(3)}
    if args.build:
        tables["index_build.csv"] = build_times(args.build).round(2)
    for name, table in tables.items():
        print(markdown(table) + "\n")
        if args.out:
            write_atomically(args.out / name, table.to_csv(index=False))


if __name__ == "__main__":
    run_script(main)
