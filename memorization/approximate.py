"""Approximate search for indexes too large for matrix products, by FAISS (optional: ``pip install faiss-cpu``).

    python -m memorization.index compress INDEX        writes INDEX/ivfpq.faiss beside the features

An inverted file of product-quantised vectors (IVF-PQ; Jegou et al., PAMI 2011) names candidates, whose true distances
are then computed from the features: distances are always exact, and only a neighbour may be missed. As a rule: lists =
4 sqrt(n), 32 to 64 bytes a vector, 16 to 64 lists visited.

On paper, for 512 float32 features (SSCD), 100 million pictures are 205 GB of features on disk and 7.2 GB of codes and
ids (64 + 8 bytes each) in memory; a query visits 64 of 40,000 lists, 160,000 codes. benchmarks/index.py measures.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor
from tqdm import tqdm

from memorization.errors import InputError

if TYPE_CHECKING:
    from memorization.index import Index

NAME = "ivfpq.faiss"
TRAINED_ON = 64  # vectors a list, for the clustering


def faiss_module():
    """The library.

    Raises:
        InputError: it is not installed.
    """
    if importlib.util.find_spec("faiss") is None:
        raise InputError("approximate search needs FAISS: pip install faiss-cpu")
    import faiss

    return faiss


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
    lists = lists or round(4 * len(index) ** 0.5)
    if lists < 1:
        raise InputError(f"--lists {lists}: at least 1")
    if code < 1 or width % code:
        raise InputError(f"--code {code}: no divisor of the features' width, {width}")
    if len(index) < max(39 * lists, 39 * 256):
        raise InputError(f"{len(index)} pictures are too few for {lists} lists: exact search is fast enough")
    made = faiss.index_factory(width, f"IVF{lists},PQ{code}", faiss.METRIC_L2)
    rows = np.random.default_rng(0).choice(
        len(index), min(len(index), max(TRAINED_ON * lists, 39 * 256)), replace=False
    )
    made.train(index.vectors(np.sort(rows)).numpy())
    for start in tqdm(range(0, len(index), at_once), desc="compress", unit=f"{at_once} pictures"):
        made.add(index.vectors(slice(start, start + at_once)).numpy())
    path = folder / NAME
    faiss.write_index(made, str(path.with_suffix(".new")))
    path.with_suffix(".new").replace(path)
    return path


class Candidates:
    """The inverted file of an index of ``count`` pictures, read into memory.

    Raises:
        InputError: it is of another number of pictures, or FAISS is missing.
    """

    def __init__(self, path: Path, count: int) -> None:
        self.faiss = faiss_module()
        self.made = self.faiss.read_index(str(path))
        if self.made.ntotal != count:
            raise InputError(f"{path}: holds {self.made.ntotal} pictures of {count}; compress the index again")

    def __call__(self, queries: Tensor, count: int, visited: int = 64) -> np.ndarray:
        """Rows that may be near each of ``queries (n, width)``, ``(n, count)``; -1 where there are fewer."""
        return self.made.search(queries.numpy(), count, params=self.faiss.SearchParametersIVF(nprobe=visited))[1]
