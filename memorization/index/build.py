"""Making an index of training pictures, and adding to it.

Building goes on where it stopped and adds what is new; pictures that cannot be read are reported and skipped.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from memorization.errors import InputError
from memorization.index.approximate import NAME
from memorization.index.descriptors import Describe, descriptor
from memorization.index.store import Index, items_of
from memorization.io.files import LineFile, line_of, read_json, write_atomically
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
    *, at_once: int = 64, device: str = "cpu",
) -> Index:  # fmt: skip
    """Add the pictures of ``source`` that ``folder`` has not yet, and open it.

    Args:
        size: (height, width), for ``pixels`` and ``latents``.
        model: folder or hub id of a CLIP checkpoint, for ``clip``; of a Stable Diffusion checkpoint, for ``latents``.

    Raises:
        InputError: the folder holds an index of another kind or size, or is being built, or what describes pictures
            cannot be had.
    """
    place = pick_device(device)
    (describe, name, revision), raw = descriptor(kind, size, model), kind == "pixels"
    width = describe(torch.zeros(1, 3, *(size or (64, 64)), device=place)).shape[1]
    record = {"kind": kind, "size": size and list(size), "width": width} | (
        {"model": name, "revision": revision} if name else {}
    )
    row = width * (1 if raw else 4)  # bytes
    with LineFile(folder / "items.jsonl", "another process is building this index") as items:
        if not (folder / "index.json").exists():
            write_atomically(folder / "index.json", json.dumps(record) + "\n")
        if read_json(folder / "index.json") != record:
            raise InputError(f"{folder}: holds an index of another kind, size or network; choose another --out")
        with open(folder / "features.bin", "ab") as features:
            # What a killed build wrote of its last batch goes, and what lost its features is made again.
            done = items_of(folder)[: (folder / "features.bin").stat().st_size // row]
            features.truncate(len(done) * row)
            items.cut(sum(len(line_of(item)) for item in done))
            new = _new(listed(source), done, source)
            for start in tqdm(range(0, len(new), at_once), folder.name, unit=f"{at_once} pictures", disable=not new):
                added, pictures = _readable(new[start : start + at_once], size)
                if not added:
                    continue
                (folder / NAME).unlink(missing_ok=True)  # what was compressed does not know them
                found = (
                    np.stack(pictures).transpose(0, 3, 1, 2) if raw else describe_pictures(describe, pictures, place)
                )
                check_finite(torch.from_numpy(found), "the description", [item["path"] for item in added])
                features.write(np.ascontiguousarray(found).tobytes())
                features.flush()
                items.append(added)
    return Index(folder)


def _readable(items: list[dict], size: tuple[int, int] | None) -> tuple[list[dict], list[np.ndarray]]:
    """Those of ``items`` whose pictures can be read, and the pictures."""
    read = [(item, read_or_skip(ROOT / item["file"], size)) for item in items]
    pairs = [(item, picture) for item, picture in read if picture is not None]
    return [item for item, _ in pairs], [picture for _, picture in pairs]


def _new(items: list[dict], done: list[dict], source: Path) -> list[dict]:
    """``items`` with their ``file``, without those whose file is among ``done`` or comes twice: the first counts."""
    wanted = {}
    for item in items:
        place = find_picture(item["path"], source.parent) or source.parent / item["path"]
        item = {**item, "file": in_project(place.resolve())}
        wanted.setdefault(item["file"], item)
    known = {in_project(Path(item["file"])) for item in done if "file" in item}
    return [item for file, item in wanted.items() if file not in known]


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
