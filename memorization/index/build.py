"""Making an index of training pictures, and adding to it.

Building goes on where it stopped and adds what is new; pictures that cannot be read are reported and skipped.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from memorization.errors import InputError, printable
from memorization.index.approximate import LISTS, NAME
from memorization.index.descriptors import Describe, description
from memorization.index.shards import Shard, check_shard
from memorization.index.store import Index, items_of
from memorization.io.files import LineFile, read_file, read_json, size_of_lines, write_atomically, writing
from memorization.io.pictures import list_pictures, read_picture, to_tensor
from memorization.io.prompts import find_picture, read_prompts
from memorization.models.devices import pick_device
from memorization.models.finite import check_finite
from memorization.models.spec import ModelSpec
from memorization.paths import ROOT, default_out, in_project


def listed(source: Path) -> list[dict]:
    """``{"path", "caption"}`` of every picture of a folder, or of a list with a column ``image``.

    Raises:
        InputError: neither, or it names no picture.
    """
    if source.is_dir():
        frame = list_pictures(source)
    else:
        frame = read_prompts(source)
        if "image" not in frame:
            raise InputError(f"{source}: no column 'image'")
        frame = frame[frame["image"].fillna("").astype(str) != ""]
    if frame.empty:
        raise InputError(f"{source}: names no picture")
    return [
        {"path": str(path), "caption": caption} for path, caption in zip(frame["image"], frame["prompt"], strict=True)
    ]


def build_index(
    source: Path, folder: Path, kind: str, size: tuple[int, int] | None = None, model: str | None = None,
    *, at_once: int = 64, device: str = "cpu", shard: Shard | None = None,
) -> Index:  # fmt: skip
    """Add the pictures of ``source`` that ``folder`` has not yet, and open it.

    Args:
        shard: which part of them, to be merged with the others (:func:`~memorization.index.shards.merge`).
        size: (height, width), for ``pixels`` and ``latents``.
        model: folder or hub id of a CLIP checkpoint, for ``clip``; of a Stable Diffusion checkpoint, for ``latents``.

    Raises:
        InputError: the folder holds an index of another kind or size, or is being built, or what describes pictures
            cannot be had.
    """
    place = pick_device(device)
    (describe, record), raw = description(kind, size, model, place), kind == "pixels"

    def described(wanted: list[dict]) -> Iterator[tuple[list[dict], np.ndarray]]:
        """Those of the ``wanted`` items whose pictures can be read, and their features ``(n, width)``."""
        starts = range(0, len(wanted), at_once)
        for start in tqdm(starts, printable(folder.name), unit=f"{at_once} pictures", disable=not wanted):
            found, pictures = _readable(wanted[start : start + at_once], size)
            if found and raw:
                yield found, np.stack(pictures).transpose(0, 3, 1, 2).reshape(len(found), -1)
            elif found:
                features = describe_pictures(describe, pictures, place)
                check_finite(torch.from_numpy(features), "the description", [item["path"] for item in found])
                yield found, features

    with LineFile(folder / "items.jsonl", "another process is building this index") as items, writing(folder):
        named = _unique(listed(source), source)
        if shard:
            named, shard = shard.part(named, at_once, source)
        check_shard(folder, shard)
        if shard:
            shard.save(folder)
        _check_record(folder, record)
        with _Features(folder / "features.bin", record["width"] * (1 if raw else 4)) as features:
            # What a killed build wrote of its last batch goes, and what lost its features is made again.
            done = items_of(folder)[: features.rows]
            features.cut(len(done))
            items.cut(size_of_lines(folder / "items.jsonl", len(done)))
            places = {in_project(Path(item["file"])): i for i, item in enumerate(done) if "file" in item}
            wanted = _wanted(named, {file: done[i].get("sha256") for file, i in places.items()})
            if wanted:  # what was compressed does not know them
                (folder / NAME).unlink(missing_ok=True)
                (folder / LISTS).unlink(missing_ok=True)
            changed = [item for item in wanted if item["file"] in places]
            if changed:
                _replace(changed, described, places, done, items, features)
            count = len(done)
            for added, found in described([item for item in wanted if item["file"] not in places]):
                features.write(count, found)
                items.append(added)
                count += len(added)
        if shard:
            replace(shard, built=count).save(folder)
    return Index(folder)


def _check_record(folder: Path, record: dict) -> None:
    """Write ``index.json`` of a new index, or see that it is what is written there."""
    if not (folder / "index.json").exists():
        if items_of(folder):
            raise InputError(f"{folder}: holds items.jsonl, but no index.json; choose another --out")
        write_atomically(folder / "index.json", json.dumps(record) + "\n")
    if read_json(folder / "index.json") != record:
        raise InputError(f"{folder}: holds an index of another kind, size or network; choose another --out")


def _replace(
    changed: list[dict], described: Callable, places: Mapping[str, int], done: list[dict], items: LineFile,
    features: _Features,
) -> None:  # fmt: skip
    """Read pictures that were replaced under their names again; they keep their places, and ``done`` says so.

    Until their features are written, no sha256 of theirs fits: a build that is killed here does it again.
    """
    at = {places[item["file"]] for item in changed}
    items.replace({**item, "sha256": ""} if i in at else item for i, item in enumerate(done))
    for again, found in described(changed):
        for item, vector in zip(again, found, strict=True):
            features.write(places[item["file"]], vector[None])
            done[places[item["file"]]] = item
    items.replace(done)


class _Features:
    """``features.bin``, open for writing: a row of ``size`` bytes a picture."""

    def __init__(self, path: Path, size: int) -> None:
        if path.exists() and not path.is_file():
            raise InputError(f"{path}: is no regular file")
        path.touch()
        self.size, self._file = size, open(path, "r+b", buffering=0)  # noqa: SIM115 - held until the block ends
        self.rows = path.stat().st_size // size

    def cut(self, rows: int) -> None:
        """Keep the first ``rows``."""
        self._file.truncate(rows * self.size)

    def write(self, row: int, found: np.ndarray) -> None:
        """Features ``(n, width)`` from ``row`` on."""
        self._file.seek(row * self.size)
        left = memoryview(np.ascontiguousarray(found).tobytes())
        while left:
            left = left[self._file.write(left) :]

    def __enter__(self) -> _Features:
        return self

    def __exit__(self, kind, error, trace) -> None:
        self._file.close()


def _readable(items: list[dict], size: tuple[int, int] | None) -> tuple[list[dict], list[np.ndarray]]:
    """Those of ``items`` whose pictures can be read, and the pictures."""
    read = [(item, read_or_skip(ROOT / item["file"], size)) for item in items]
    pairs = [(item, picture) for item, picture in read if picture is not None]
    return [item for item, _ in pairs], [picture for _, picture in pairs]


def _unique(items: list[dict], source: Path) -> list[dict]:
    """``items`` with their ``file``; where one comes twice, the first counts."""
    found = {}
    for item in items:
        place = find_picture(item["path"], source.parent) or source.parent / item["path"]
        item = {**item, "file": in_project(place.resolve())}
        found.setdefault(item["file"], item)
    return list(found.values())


def _wanted(items: Sequence[dict], known: Mapping[str, str | None]) -> list[dict]:
    """``items`` with the ``sha256`` of their files, without those that the index has as they are.

    Of a file that is not there any more, the index keeps what it has.

    Args:
        known: file -> sha256 of what the index has; None where an older build has not noted it.
    """
    hashed = [{**item, "sha256": _hash(ROOT / item["file"])} for item in items]
    return [item for item in hashed
            if item["file"] not in known or item["sha256"] not in ("", known[item["file"]])]  # fmt: skip


def _hash(path: Path) -> str:
    """sha256 of a file; nothing of one that cannot be read, which is said when it is read as a picture."""
    try:
        return hashlib.sha256(read_file(path)).hexdigest()
    except InputError:
        return ""


def own_index(spec: ModelSpec) -> Path:
    """The folder of an index of the training pictures that a model's own list names, made where it is not there.

    Raises:
        InputError: it has no list with pictures.
    """
    source = spec.own_list()
    if source is None or not source.is_file() or "image" not in read_prompts(source):
        raise InputError(f"model {spec.name!r} has no list of training pictures: python -m memorization.index build")
    folder = default_out("index", spec.name)
    build_index(source, folder, "pixels", (64, 64))
    return folder


@torch.no_grad()
def describe_pictures(describe: Describe, pictures: list[np.ndarray], device: torch.device | str = "cpu") -> np.ndarray:
    """Features, float32 ``(n, width)``, of pictures of any size; those of one size together."""
    places: dict[tuple, list[int]] = {}
    for i, picture in enumerate(pictures):
        places.setdefault(picture.shape, []).append(i)
    found: list = [None] * len(pictures)
    for rows in places.values():
        for chunk in (rows[i : i + 8] for i in range(0, len(rows), 8)):
            made = describe(to_tensor(np.stack([pictures[i] for i in chunk])).to(device)).cpu().numpy()
            for i, vector in zip(chunk, made, strict=True):
                found[i] = vector
    return np.stack(found)


def read_or_skip(path: Path, size: tuple[int, int] | None) -> np.ndarray | None:
    """The picture, uint8 ``(h, w, 3)``, at ``size`` if given; None, and a line on standard error where unreadable."""
    try:
        return read_picture(path, size)
    except InputError as error:
        print(f"skipped: {error}", file=sys.stderr)
        return None
