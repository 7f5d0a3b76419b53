"""Writing an index in one go, from what is known already: shards of it, or embeddings that another program made."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from memorization.errors import InputError
from memorization.io.files import replacing, write_atomically, writing


@contextmanager
def new_index(folder: Path, record: dict) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """Files for the lines of ``items.jsonl`` and for ``features.bin``; the index is there when the block ends.

    Args:
        record: what ``index.json`` holds, which is written last.

    Raises:
        InputError: the folder holds an index, or cannot be written.
    """
    if any((folder / name).exists() for name in ("index.json", "items.jsonl")):
        raise InputError(f"{folder}: holds an index already; choose another --out")
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with (
        replacing(folder / "items.jsonl") as items, replacing(folder / "features.bin") as features,
        items.open("wb") as lines, features.open("wb") as vectors,
    ):  # fmt: skip
        yield lines, vectors
    write_atomically(folder / "index.json", json.dumps(record) + "\n")
