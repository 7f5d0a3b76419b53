"""Approximate search for indexes too large for matrix products, by FAISS (optional: ``pip install faiss-cpu``).

    python -m memorization.index compress INDEX             writes INDEX/ivfpq.faiss beside the features
    python -m memorization.index compress INDEX --on-disk   and leaves its lists on disk, in INDEX/ivfpq.ivfdata

An inverted file of product-quantised vectors (IVF-PQ; Jegou et al., PAMI 2011) names candidates, whose true distances
are then computed from the features: distances are always exact, and only a neighbour may be missed. As a rule: lists =
4 sqrt(n), 32 to 64 bytes a vector, 16 to 64 lists visited.

On paper, for 512 float32 features (SSCD), 100 million pictures are 205 GB of features on disk and 7.2 GB of codes and
ids (64 + 8 bytes each), in memory or on disk; a query visits 64 of 40,000 lists, 160,000 codes. benchmarks/index.py
measures.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
from torch import Tensor

from memorization.errors import InputError

NAME = "ivfpq.faiss"
LISTS = "ivfpq.ivfdata"  # its lists, where they are left on disk


def faiss_module():
    """The library.

    Raises:
        InputError: it is not installed.
    """
    if importlib.util.find_spec("faiss") is None:
        raise InputError("approximate search needs FAISS: pip install faiss-cpu")
    import faiss

    return faiss


class Candidates:
    """The inverted file of an index of ``count`` pictures, read into memory, but for lists that were left on disk.

    Raises:
        InputError: it is of another number of pictures, or FAISS is missing.
    """

    def __init__(self, path: Path, count: int) -> None:
        self.faiss = faiss_module()
        # The lists lie beside it, wherever the index was when it was written.
        flags = self.faiss.IO_FLAG_ONDISK_SAME_DIR | self.faiss.IO_FLAG_READ_ONLY
        try:
            self.made = self.faiss.read_index(str(path), flags)
        except RuntimeError:
            raise InputError(f"{path}: damaged; compress the index again") from None
        if self.made.ntotal != count:
            raise InputError(f"{path}: holds {self.made.ntotal} pictures of {count}; compress the index again")

    def __call__(self, queries: Tensor, count: int, visited: int = 64) -> np.ndarray:
        """Rows that may be near each of ``queries (n, width)``, ``(n, count)``; -1 where there are fewer."""
        return self.made.search(queries.numpy(), count, params=self.faiss.SearchParametersIVF(nprobe=visited))[1]
