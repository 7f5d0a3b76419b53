"""Writing the inverted file of an index; approximate.py searches in it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from tqdm import tqdm

from memorization.errors import InputError
from memorization.index.approximate import NAME, faiss_module
from memorization.index.store import Index
from memorization.io.files import replacing

TRAINED_ON = 64  # vectors a list, for the clustering


def compress(index: Index, folder: Path, lists: int | None = None, code: int = 64, at_once: int = 65536) -> Path:
    """Write the inverted file of an index.

    Args:
        lists: default 4 sqrt(pictures).
        code: bytes a vector; a divisor of the features' width.

    Raises:
        InputError: FAISS is missing, or there are too few pictures.
    """
    faiss = faiss_module()
    width = index.features.shape[1]
    count = round(4 * len(index) ** 0.5) if lists is None else lists
    if count < 1:
        raise InputError(f"--lists {count}: at least 1")
    if code < 1 or width % code:
        raise InputError(f"--code {code}: no divisor of the features' width, {width}")
    if len(index) < max(39 * count, 39 * 256):
        raise InputError(f"{len(index)} pictures are too few for {count} lists: exact search is fast enough")
    made = faiss.index_factory(width, f"IVF{count},PQ{code}", faiss.METRIC_L2)
    rows = np.random.default_rng(0).choice(
        len(index), min(len(index), max(TRAINED_ON * count, 39 * 256)), replace=False
    )
    made.train(index.vectors(np.sort(rows)).numpy())
    for start in tqdm(range(0, len(index), at_once), desc="compress", unit=f"{at_once} pictures"):
        made.add(index.vectors(slice(start, start + at_once)).numpy())
    path = folder / NAME
    with replacing(path) as part:
        faiss.write_index(made, str(part))
    return path
