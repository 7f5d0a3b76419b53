"""Shards of an index, each built by a machine of its own, and the whole that they are merged to.

A shard is an index of a stretch of the list, beside a file ``shard.json`` that says which. Stretches begin where a
batch of a whole build would, so that the networks are given the same batches and the merged index has the same bytes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from memorization.errors import InputError
from memorization.index.store import Index, IndexRecord, items_of
from memorization.index.writing import new_index
from memorization.io.files import is_file, read_json, size_of_lines, write_atomically
from memorization.settings import Checked, Count, Place, make

NAME = "shard.json"
AT_ONCE = 2**24  # bytes that are copied at once


@dataclass(frozen=True)
class Shard(Checked):
    """Which part of a list an index holds.

    Args:
        number: of the shard, from 1.
        of: so many shards.
        digest: tells the list from others; empty until it is known.
        pictures: that the list names.
        built: pictures that the shard holds, once it was built to its end.
    """

    number: Count
    of: Count
    digest: str = ""
    pictures: Place = 0
    built: Place | None = None

    def __str__(self) -> str:
        return f"shard {self.number}/{self.of}"

    def part(self, items: Sequence[dict], at_once: int, source: Path) -> tuple[Sequence[dict], Shard]:
        """Its stretch of all ``items``, in whole batches of ``at_once``; and the shard of that list.

        Raises:
            InputError: there are fewer batches than shards.
        """
        batches = -(-len(items) // at_once)
        if batches < self.of:
            raise InputError(f"{source}: {len(items)} pictures are {batches} batches of {at_once}, too few for "
                             f"{self.of} shards")  # fmt: skip
        first, stop = (at_once * (batches * number // self.of) for number in (self.number - 1, self.number))
        lines = (json.dumps([item["path"], item["caption"], item["file"]]) for item in items)
        digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()
        return items[first:stop], replace(self, digest=digest, pictures=len(items))

    def save(self, folder: Path) -> None:
        """Write ``shard.json``."""
        write_atomically(folder / NAME, json.dumps(asdict(self)) + "\n")


def read_shard(folder: Path) -> Shard | None:
    """Which shard a folder holds; None of a whole index, or of none.

    Raises:
        InputError: ``shard.json`` is damaged.
    """
    path = folder / NAME
    return make(Shard, read_json(path), f"{path}: damaged") if path.exists() else None


def check_shard(folder: Path, shard: Shard | None) -> None:
    """See that what is to be built into ``folder`` is what it holds.

    Raises:
        InputError: it holds another shard, or a whole index where a shard is to be built, or the other way round.
    """
    there = read_shard(folder)
    if shard is None and there:
        raise InputError(f"{folder}: holds {there} of an index; choose another --out")
    if shard and there is None and (folder / "index.json").exists():
        raise InputError(f"{folder}: holds an index that is no shard; choose another --out")
    if shard and there and replace(there, built=None) != shard:
        what = "another list" if (there.number, there.of) == (shard.number, shard.of) else str(there)
        raise InputError(f"{folder}: holds {what}, not this {shard}; choose another --out")


class _Built(NamedTuple):
    """A shard that was built to its end: where it lies, and what its ``index.json`` holds."""

    folder: Path
    shard: Shard
    record: dict

    def copy(self, lines: BinaryIO, vectors: BinaryIO) -> None:
        """Append its items and features, as they lie there."""
        made = make(IndexRecord, self.record, f"{self.folder / 'index.json'}: damaged")
        row = made.width * np.dtype(made.dtype).itemsize
        count = self.shard.built or 0
        _copy(self.folder / "items.jsonl", lines, size_of_lines(self.folder / "items.jsonl", count))
        _copy(self.folder / "features.bin", vectors, count * row)


def merge(folders: Sequence[Path], out: Path) -> Index:
    """Put the shards of an index, given in any order, together in ``out``; the bytes are those of one build.

    Raises:
        InputError: a folder holds no shard that was built to its end, they are of other settings or lists, one is
            missing or there twice, or ``out`` holds an index.
    """
    built = sorted(map(_read, folders), key=lambda one: one.shard.number)
    _check_alike(built)
    _check_whole(built)
    with new_index(out, built[0].record) as (lines, vectors):
        for one in built:
            one.copy(lines, vectors)
    return Index(out)


def _read(folder: Path) -> _Built:
    shard = read_shard(folder)
    if shard is None or not is_file(folder / "index.json"):
        raise InputError(f"{folder}: holds no shard of an index (index build --shard)")
    if shard.built is None:
        raise InputError(f"{folder}: {shard} was not built to its end; the same build command goes on")
    if len(items_of(folder)) < shard.built:
        raise InputError(f"{folder}: {shard} has lost some of its {shard.built} pictures; build it again")
    return _Built(folder, shard, read_json(folder / "index.json"))


def _check_alike(built: Sequence[_Built]) -> None:
    first = built[0]
    for one in built[1:]:
        keys = [*dict.fromkeys([*first.record, *one.record])]
        if other := [key for key in keys if first.record.get(key) != one.record.get(key)]:
            said = f"{other[0]}: {one.record.get(other[0])} there, {first.record.get(other[0])} in {first.folder}"
            raise InputError(f"{one.folder}: {one.shard} is of other settings ({said})")
        if one.shard.of != first.shard.of:
            raise InputError(f"{one.folder}: is {one.shard}, but {first.folder} {first.shard}")
        if one.shard.digest != first.shard.digest:
            raise InputError(f"{one.folder}: {one.shard} is of another list than that in {first.folder}")


def _check_whole(built: Sequence[_Built]) -> None:
    there: dict[int, _Built] = {}
    for one in built:
        if one.shard.number in there:
            raise InputError(f"{one.folder}: {one.shard} is given twice, also in {there[one.shard.number].folder}")
        there[one.shard.number] = one
    of = built[0].shard.of
    if missing := [str(number) for number in range(1, of + 1) if number not in there]:
        raise InputError(f"shards {', '.join(missing)} of {of} are missing")


def _copy(path: Path, to: BinaryIO, size: int) -> None:
    """The first ``size`` bytes.

    Raises:
        InputError: there are fewer.
    """
    try:
        with open(path, "rb") as file:
            while size and (part := file.read(min(size, AT_ONCE))):
                to.write(part)
                size -= len(part)
    except FileNotFoundError:
        pass
    if size:
        raise InputError(f"{path}: is missing or cut short; the same build command makes it whole")
