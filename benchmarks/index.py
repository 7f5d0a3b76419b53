#!/usr/bin/env python
"""Search in an index of training pictures by its size: exact, and by FAISS if installed; batches of 64 queries.

python benchmarks/index.py                          10,000 and 100,000 made-up SSCD-like features
python benchmarks/index.py --sizes 1000000
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

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from memorization.approximate import NAME, compress  # noqa: E402
from memorization.errors import ArgumentParser, InputError, run_script  # noqa: E402
from memorization.index import Index  # noqa: E402
from memorization.tables import markdown  # noqa: E402

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


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000, 100_000])
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
            row = {"pictures": size, "opening, s": opening, f"exact, s / {QUERIES}": exact}
            try:
                packing, _ = seconds(lambda index=index, folder=folder: compress(index, folder))
                packed = Index(folder)
                near, (_, found) = seconds(lambda packed=packed, queries=queries: packed.search(queries, K))
                recall = np.mean([len(set(a) & set(b)) / K for a, b in zip(true.tolist(), found.tolist(), strict=True)])
                row |= {"compress, s": packing, "MB": (folder / NAME).stat().st_size / 1e6,
                        f"FAISS, s / {QUERIES}": near, f"recall of {K}": recall,
                        "nearest found": (true[:, 0] == found[:, 0]).float().mean().item()}  # fmt: skip
            except InputError as error:
                print(error, file=sys.stderr)
            rows.append(row)
    print(markdown(pd.DataFrame(rows).round(3)))


if __name__ == "__main__":
    run_script(main)
