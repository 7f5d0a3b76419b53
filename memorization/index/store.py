"""An index on disk: training pictures, their captions and features, and the search in them.

Features lie in one memory-mapped file, so an index may be larger than memory. Search is exact, by matrix products over
chunks. Features are the pictures themselves at a small size (``pixels``), their latents in a checkpoint's autoencoder
(``latents``), or SSCD descriptors or CLIP embeddings of the whole pictures (``sscd``, ``clip``).
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from memorization.errors import InputError
from memorization.index.approximate import LISTS, NAME, Candidates
from memorization.index.descriptors import Describe, descriptor
from memorization.index.kinds import FEATURES, SIZED
from memorization.io.files import is_file, read_json, sha256_of, whole_lines
from memorization.io.pictures import read_picture
from memorization.paths import ROOT
from memorization.settings import Checked, Count, make, value_of
from memorization.similarity.nl2 import l2

CHUNK = 2**28  # bytes of features, as float32, that are in memory at once while searching


class Index:
    """Training pictures, their captions and features.

    Attributes:
        kind: ``pixels`` (uint8, the picture at ``size``), ``latents`` (scaled, flattened), ``sscd`` or ``clip`` (unit
            vectors).
        size: (height, width) that pictures were brought to, for ``pixels`` and ``latents``.
        model: folder or hub id of the checkpoint, for ``clip`` and ``latents``.
        features: memory-mapped, ``(pictures, width)``.
        candidates: of the approximate search, where the index was compressed.
        revision: tells the weights of the network that made it from others; None of an index that has none.
        paths, captions, files: of every picture: its name in the list, its text, and where it was read (a file of the
            project relative to it).

    Args:
        approximately: use what ``compress`` wrote, if it is there.

    Raises:
        InputError: the folder holds no whole index.
    """

    def __init__(self, folder: Path, *, approximately: bool = True) -> None:
        if not is_file(folder / "index.json"):
            raise InputError(f"{folder}: holds no index; python -m memorization.index build makes one")
        items = items_of(folder)
        if not items:
            raise InputError(f"{folder}: the index holds no picture")
        record = read_json(folder / "index.json")
        made = make(IndexRecord, record, f"{folder / 'index.json'}: damaged")
        if (made.kind in SIZED) != (made.size is not None and len(made.size) == 2):
            raise InputError(f"{folder / 'index.json'}: damaged: size = {record['size']} of {made.kind}")
        self.kind, self.model = made.kind, made.model
        self.size: tuple[int, int] | None = (made.size[0], made.size[1]) if made.size else None
        if self.kind == "pixels" and self.size and made.width != 3 * self.size[0] * self.size[1]:
            raise InputError(f"{folder / 'index.json'}: damaged: width = {made.width} of pictures of {self.size}")
        self.paths, self.captions = [item["path"] for item in items], [item["caption"] for item in items]
        self.files = [item.get("file", item["path"]) for item in items]
        self.folder, self.revision = folder, made.revision
        features, shape = folder / "features.bin", (len(items), made.width)
        if not is_file(features) or features.stat().st_size < shape[0] * shape[1] * np.dtype(made.dtype).itemsize:
            raise InputError(f"{features}: is missing or cut short; the same build command makes it whole")
        self.features = np.memmap(features, made.dtype, "r", shape=shape)
        compressed = folder / NAME
        found = approximately and compressed.exists()
        self.candidates = Candidates(compressed, len(items)) if found else None

    def __len__(self) -> int:
        return len(self.paths)

    @cached_property
    def digest(self) -> str:
        """Tells what it holds, and what finds it, from any other's: the sha256 of its files."""
        names = ["index.json", "items.jsonl", "features.bin"]
        names += [name for name in (NAME, LISTS) if self.candidates and (self.folder / name).exists()]
        return hashlib.sha256("".join(sha256_of(self.folder / name) for name in names).encode()).hexdigest()[:16]

    @cached_property
    def describe(self) -> Describe:
        """Features ``(n, width)`` of pictures ``(n, 3, h, w)`` in [-1, 1], on their device; differentiable.

        Raises:
            InputError: the network cannot be had, or is another than the index was made with.
        """
        describe, name, revision = descriptor(self.kind, self.size, self.model)
        if name != self.model:
            raise InputError(f"the index was made with {self.model}, here is {name}; build it anew")
        if self.revision and revision != self.revision:  # earlier versions did not record it
            raise InputError(f"the index was made with other weights of {self.model}; build it anew")
        return describe

    def vectors(self, rows: Sequence[int] | slice | np.ndarray) -> Tensor:
        """``rows`` as they are compared, float32: pixels in [-1, 1] or latents, flattened; or unit vectors."""
        found = torch.from_numpy(np.array(self.features[rows])).float()
        return found / 127.5 - 1 if self.kind == "pixels" else found

    def pictures(self, size: tuple[int, int]) -> np.ndarray:
        """The training pictures, uint8 ``(n, h, w, 3)`` of ``size`` (height, width).

        An index of pixels holds them; others say where they lie.

        Raises:
            InputError: the index holds pixels of another size, or a file cannot be read.
        """
        if self.kind != "pixels":
            return np.stack([read_picture(ROOT / file, size) for file in self.files])
        if self.size != size:
            raise InputError(
                f"the index holds pictures of {self.size}, not of {size}: build it with --size {size[0]} {size[1]}"
            )
        return np.ascontiguousarray(np.reshape(self.features, (-1, 3, *size)).transpose(0, 2, 3, 1))

    def distance(self, queries: Tensor, vectors: Tensor) -> Tensor:
        """``(queries, vectors)``: root mean square difference / 2, or 1 - cosine for unit vectors."""
        return l2(queries, vectors) if self.kind in SIZED else 1 - queries @ vectors.T

    @torch.no_grad()
    def search(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The ``k`` nearest of every query ``(n, width)``: distances ``(n, k)``, nearest first, and rows ``(n, k)``.

        Exact; where the index was compressed, a neighbour may be missed, but never its distance wrong.
        """
        k = min(k, len(self))
        if self.candidates:
            return self._search_candidates(self.candidates, queries.float().cpu(), k)
        best = torch.full((len(queries), k), torch.inf)
        rows = torch.zeros(len(queries), k, dtype=torch.long)
        queries = queries.float().cpu()
        step = max(1, CHUNK // (4 * self.features.shape[1]))
        for start in range(0, len(self), step):
            chunk = self.vectors(slice(start, start + step))
            distance = self.distance(queries, chunk)
            merged, place = torch.cat([best, distance], 1).topk(k, largest=False)
            number = torch.arange(start, start + len(chunk)).expand(len(queries), -1)
            rows = torch.cat([rows, number], 1).gather(1, place)
            best = merged
        return best, rows

    def _search_candidates(self, candidates: Candidates, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        found = []
        for query, named in zip(queries, candidates(queries, 4 * k), strict=True):
            rows = np.unique(named[named >= 0])
            if len(rows) < k:  # the lists visited hold too few
                rows = np.arange(len(self))
            distance, place = self.distance(query[None], self.vectors(rows))[0].topk(k, largest=False)
            found.append((distance, torch.from_numpy(rows)[place]))
        distances, rows = zip(*found, strict=True)
        return torch.stack(distances), torch.stack(rows)

    def multiplicity(self, rows: Tensor) -> list[int]:
        """How often the caption of the first of ``rows (n, k)`` occurs among all of them; 0 where it is empty."""
        captions = [[self.captions[i] for i in neighbours] for neighbours in rows.tolist()]
        return [Counter(own)[own[0]] if own[0] else 0 for own in captions]


@dataclass(frozen=True)
class IndexRecord(Checked):
    """What ``index.json`` holds."""

    kind: Literal[FEATURES]  # ty: ignore[invalid-type-form]
    size: tuple[Count, ...] | None
    width: Count
    model: str | None = None
    revision: str | None = None

    @property
    def dtype(self) -> type:
        """Of the features on disk."""
        return np.uint8 if self.kind == "pixels" else np.float32


ITEM = {"path": str, "caption": str, "file": str, "sha256": str}
NEEDED = ("path", "caption")


def items_of(folder: Path) -> list[dict]:
    """The whole lines of ``items.jsonl``, a picture each.

    Raises:
        InputError: a line is damaged; names the field.
    """
    path = folder / "items.jsonl"
    items = list(whole_lines(path, "build the index anew, in another folder"))
    for number, item in enumerate(items, 1):
        for name, kind in ITEM.items():
            if name in item or name in NEEDED:
                value_of(kind, item.get(name), f"{path}, line {number}: damaged: {name}")
    return items
