"""Writing the inverted file of an index; approximate.py searches in it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
from tqdm import tqdm

from memorization.errors import InputError
from memorization.index.approximate import LISTS, NAME, faiss_module
from memorization.index.store import Index
from memorization.io.files import replacing, sha256_of, writing

TRAINED_ON = 64  # vectors a list, for the clustering
AT_ONCE = 65536  # vectors that are encoded at once


def compress(
    index: Index, folder: Path, lists: int | None = None, code: int = 64, *, on_disk: bool = False,
    block: int = 2**20,
) -> Path:  # fmt: skip
    """Write the inverted file of an index: lists and codes are learnt from a sample, then all vectors are encoded.

    Args:
        lists: default 4 sqrt(pictures).
        code: bytes a vector; a divisor of the features' width.
        on_disk: leave the lists on disk, where searching reads those that it visits. They are filled block by block,
            each a file until all are there: memory holds one at a time, and a killed call goes on.
        block: vectors to a block.

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

    def train():
        made = faiss.index_factory(width, f"IVF{count},PQ{code}", faiss.METRIC_L2)
        sample = min(len(index), max(TRAINED_ON * count, 39 * 256))
        rows = np.random.default_rng(0).choice(len(index), sample, replace=False)
        made.train(index.vectors(np.sort(rows)).numpy())
        return made

    if on_disk:
        what = f"{count}-{code}-{block}-{sha256_of(index.folder / 'items.jsonl')[:16]}"
        made = _filled_on_disk(faiss, index, folder, train, folder / f"ivfpq-{what}.parts", block)
    else:
        made = train()
        _fill(made, index, range(len(index)))
        (folder / LISTS).unlink(missing_ok=True)
    with replacing(folder / NAME) as part:
        faiss.write_index(made, str(part))
    return folder / NAME


def _fill(made, index: Index, rows: range) -> None:
    """Encode so many rows, under their numbers."""
    for start in tqdm(rows[::AT_ONCE], desc="compress", unit=f"{AT_ONCE} pictures"):
        stop = min(start + AT_ONCE, rows.stop)
        made.add_with_ids(index.vectors(slice(start, stop)).numpy(), np.arange(start, stop))


def _filled_on_disk(faiss, index: Index, folder: Path, train: Callable, parts: Path, block: int):
    """An inverted file whose lists are in ``ivfpq.ivfdata``. ``parts`` is named by all that its files depend on."""
    from faiss.contrib.ondisk import merge_ondisk

    with writing(parts):
        parts.mkdir(parents=True, exist_ok=True)

    def kept(name: str, make: Callable) -> Path:
        path = parts / name
        if not path.exists():
            with replacing(path) as part:
                faiss.write_index(make(), str(part))
        return path

    trained = kept("trained.faiss", train)

    def encoded(rows: range):
        made = faiss.read_index(str(trained))
        _fill(made, index, rows)
        return made

    starts = range(0, len(index), block)
    files = [
        kept(f"{start // block:05d}.faiss", lambda start=start: encoded(range(start, min(start + block, len(index)))))
        for start in starts
    ]
    # What was compressed before goes first: its lists are overwritten.
    (folder / NAME).unlink(missing_ok=True)
    (folder / LISTS).unlink(missing_ok=True)
    made = faiss.read_index(str(trained))
    merge_ondisk(made, [str(path) for path in files], str(folder / LISTS))
    shutil.rmtree(parts)
    return made
