"""A local index of training pictures: ``python -m memorization.index build FOLDER --out INDEX``

  python -m memorization.index build FOLDER --out INDEX                a folder of pictures; metadata.jsonl for captions
  python -m memorization.index build prompts/testbed.csv --out INDEX   a list with columns image and prompt
  python -m memorization.index search INDEX picture.png -k 5
  python -m memorization.index compress INDEX                          for more than a few 100,000 pictures, by FAISS

Features lie in one memory-mapped file, so an index may be larger than memory. Search is exact, by matrix products over
chunks. Building goes on where it stopped and adds what is new; pictures that cannot be read are reported and skipped.
Features are the pictures themselves at a small size (``pixels``), their latents in a checkpoint's autoencoder
(``latents``), or SSCD descriptors or CLIP embeddings of the whole pictures (``sscd``, ``clip``).
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import sys
from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from memorization import approximate
from memorization.descriptors import FEATURES, SIZED, Describe, descriptor
from memorization.errors import ArgumentParser, InputError, run_script
from memorization.images import list_images
from memorization.models import ROOT, ModelSpec, pick_device
from memorization.pictures import read_picture, to_tensor
from memorization.prompts import read_prompts
from memorization.results import read_json, write_atomically
from memorization.similarity.pixel import l2

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
        digest: tells its content from another's.
        paths, captions, files: of every picture: its name in the list, its text, and where it was read (a file of the
            project relative to it).

    Args:
        approximately: use what ``compress`` wrote, if it is there.

    Raises:
        InputError: the folder holds no whole index.
    """

    def __init__(self, folder: Path, *, approximately: bool = True) -> None:
        if not (folder / "index.json").is_file():
            raise InputError(f"{folder}: holds no index; python -m memorization.index build makes one")
        items = _items(folder)
        if not items:
            raise InputError(f"{folder}: the index holds no picture")
        record = read_json(folder / "index.json")
        try:
            self.kind, self.size = record["kind"], record["size"] and tuple(record["size"])
            self.model, width = record.get("model"), record["width"]
            self.paths, self.captions = [item["path"] for item in items], [item["caption"] for item in items]
        except (KeyError, TypeError) as error:
            raise InputError(
                f"{folder}: index.json or items.jsonl is damaged ({error}); build the index anew"
            ) from None
        self.files = [item.get("file", item["path"]) for item in items]
        dtype = np.uint8 if self.kind == "pixels" else np.float32
        features, shape = folder / "features.bin", (len(items), width)
        if not features.is_file() or features.stat().st_size < shape[0] * shape[1] * np.dtype(dtype).itemsize:
            raise InputError(f"{features}: is missing or cut short; the same build command makes it whole")
        self.features = np.memmap(features, dtype, "r", shape=shape)
        compressed = folder / approximate.NAME
        found = approximately and compressed.exists()
        self.candidates = approximate.Candidates(compressed, len(items)) if found else None
        # The features follow from what is listed here and from how they are made.
        self.digest = hashlib.sha256(json.dumps([record, self.paths, self.captions]).encode()).hexdigest()[:16]

    def __len__(self) -> int:
        return len(self.paths)

    @cached_property
    def describe(self) -> Describe:
        """Features ``(n, width)`` of pictures ``(n, 3, h, w)`` in [-1, 1], on their device; differentiable.

        Raises:
            InputError: the network cannot be had, or is another than the index was made with.
        """
        describe, name = descriptor(self.kind, self.size, self.model)
        if name != self.model:
            raise InputError(f"the index was made with {self.model}, here is {name}; build it anew")
        return describe

    def vectors(self, rows: Sequence[int] | slice) -> Tensor:
        """``rows`` as they are compared, float32: pixels in [-1, 1] or latents, flattened; or unit vectors."""
        found = torch.from_numpy(np.array(self.features[rows])).float()
        return found / 127.5 - 1 if self.kind == "pixels" else found

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
            return self._search_candidates(queries.float().cpu(), k)
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

    def _search_candidates(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        found = []
        for query, named in zip(queries, self.candidates(queries, 4 * k), strict=True):
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


def _items(folder: Path) -> list[dict]:
    path = folder / "items.jsonl"
    content = path.read_bytes() if path.exists() else b""
    try:
        return [json.loads(line) for line in content[: content.rfind(b"\n") + 1].split(b"\n") if line]
    except ValueError as error:
        raise InputError(f"{path}: damaged ({error}); build the index anew, in another folder") from None


def listed(source: Path) -> list[dict]:
    """``{"path", "caption"}`` of every picture of a folder, or of a list with a column ``image``.

    Raises:
        InputError: neither, or it names no picture.
    """
    if source.is_dir():
        frame = list_images(source)
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


def build(
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
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder}: cannot be made ({error.strerror})") from None
    device = pick_device(device)
    (describe, name), raw = descriptor(kind, size, model), kind == "pixels"
    width = describe(torch.zeros(1, 3, *(size or (64, 64)), device=device)).shape[1]
    record = {"kind": kind, "size": size and list(size), "width": width} | ({"model": name} if name else {})
    if not (folder / "index.json").exists():
        write_atomically(folder / "index.json", json.dumps(record) + "\n")
    if read_json(folder / "index.json") != record:
        raise InputError(f"{folder}: holds an index of another kind, size or network; choose another --out")
    row = width * (1 if raw else 4)  # bytes
    with open(folder / "features.bin", "ab") as features, open(folder / "items.jsonl", "ab") as items:
        try:
            fcntl.flock(items, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{folder}: another process is building this index") from None
        # What a killed build wrote of its last batch goes, and what lost its features is made again.
        done = _items(folder)[: (folder / "features.bin").stat().st_size // row]
        features.truncate(len(done) * row)
        items.truncate(sum(len(_line(item)) for item in done))
        new = _new(listed(source), done, source)
        for start in tqdm(range(0, len(new), at_once), desc=folder.name, unit=f"{at_once} pictures", disable=not new):
            batch = [(item, picture) for item in new[start : start + at_once]
                     if (picture := _read(ROOT / item["file"], size)) is not None]  # fmt: skip
            if not batch:
                continue
            (folder / approximate.NAME).unlink(missing_ok=True)  # what was compressed does not know them
            pictures = [picture for _, picture in batch]
            found = np.stack(pictures).transpose(0, 3, 1, 2) if raw else _describe(describe, pictures, device)
            features.write(np.ascontiguousarray(found).tobytes())
            features.flush()
            items.write(b"".join(_line(item) for item, _ in batch))
            items.flush()
    return Index(folder)


def _new(items: list[dict], done: list[dict], source: Path) -> list[dict]:
    """``items`` with their ``file``, without those whose file is among ``done`` or comes twice: the first counts."""
    wanted = {}
    for item in items:
        item = {**item, "file": _in_project(_place(item["path"], source).resolve())}
        wanted.setdefault(item["file"], item)
    known = {_in_project(Path(item["file"])) for item in done if "file" in item}
    return [item for file, item in wanted.items() if file not in known]


def _in_project(path: Path) -> str:
    """A file of the project relative to it, so that the project can be moved; others as they are."""
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


def _place(name: str, source: Path) -> Path:
    """Where a picture of ``source`` is: beside it, here, or in the project."""
    places = [source.parent / name, Path(name), ROOT / name]
    return next((place for place in places if place.is_file()), places[0])


def own_index(spec: ModelSpec) -> Path:
    """The folder of an index of the training pictures that a model's own list names, made where it is not there.

    Raises:
        InputError: it has no list with pictures.
    """
    source = ROOT / spec.prompts.get("prompts", "")
    if not source.is_file() or "image" not in read_prompts(source):
        raise InputError(f"model {spec.name!r} has no list of training pictures: python -m memorization.index build")
    folder = ROOT / "results" / "local" / f"{spec.name}-index"
    build(source, folder, "pixels", (64, 64))
    return folder


@torch.no_grad()
def _describe(describe: Describe, pictures: list[np.ndarray], device: torch.device | str = "cpu") -> np.ndarray:
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


def _line(item: dict) -> bytes:
    return (json.dumps(item, ensure_ascii=False) + "\n").encode()


def _read(path: Path, size: tuple[int, int] | None) -> np.ndarray | None:
    """The picture, uint8 ``(h, w, 3)``, at ``size`` if given; None, and a line on standard error where unreadable."""
    try:
        return read_picture(path, size)
    except InputError as error:
        print(f"skipped: {error}", file=sys.stderr)
        return None


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    make = commands.add_parser("build", help="make an index, or add to it")
    make.add_argument("source", type=Path, help="a folder of pictures, or a list with columns image and prompt")
    make.add_argument("--out", type=Path, required=True, metavar="INDEX")
    make.add_argument("--features", choices=FEATURES, default="pixels", help="default: %(default)s")
    make.add_argument("--model", metavar="FOLDER|HUB_ID", help="clip: the CLIP checkpoint; latents: the Stable "
        "Diffusion checkpoint whose autoencoder it is")  # fmt: skip
    make.add_argument("--size", type=int, nargs=2, metavar=("H", "W"), help="of pixels, or of pictures before they "
        "are encoded to latents (default: 64 64; Stable Diffusion's latents: 512 512)")  # fmt: skip
    make.add_argument("--device", default="auto", help="for the networks of latents, sscd and clip (default: auto)")
    pack = commands.add_parser("compress", help="for more than a few 100,000 pictures: approximate search by FAISS")
    pack.add_argument("index", type=Path)
    pack.add_argument("--lists", type=int, help="of the inverted file (default: 4 sqrt of the pictures)")
    pack.add_argument("--code", type=int, default=64, help="bytes a picture (default: %(default)s)")
    find = commands.add_parser("search", help="the training pictures nearest to pictures of yours")
    find.add_argument("index", type=Path)
    find.add_argument("pictures", nargs="+")
    find.add_argument("-k", type=int, default=5)
    args = parser.parse_args()
    if args.command == "build":
        if args.size and (args.features not in SIZED or min(args.size) < 1):
            parser.error(f"--size is for {' and '.join(SIZED)}, and at least 1 1")
        if (args.features in ("clip", "latents")) != bool(args.model):
            parser.error("--features clip or latents, and --model, go together")
        size = tuple(args.size or (64, 64)) if args.features in SIZED else None
        index = build(args.source, args.out, args.features, size, args.model, device=args.device)
        print(f"{args.out}: {len(index)} pictures, {index.kind}")
        return
    index = Index(args.index, approximately=args.command == "search")
    if args.command == "compress":
        print(approximate.compress(index, args.index, args.lists, args.code))
        return
    if args.k < 1:
        parser.error("-k is at least 1")
    pictures = {name: picture for name in args.pictures if (picture := _read(Path(name), index.size)) is not None}
    if not pictures:
        raise InputError("none of the pictures can be read")
    vectors = torch.from_numpy(_describe(index.describe, list(pictures.values())))
    for name, distances, rows in zip(pictures, *index.search(vectors, args.k), strict=True):
        print(name)
        for distance, row in zip(distances.tolist(), rows.tolist(), strict=True):
            print(f"  {distance:.3f}  {index.paths[row]}  {index.captions[row]}")
        (times,) = index.multiplicity(rows[None])
        if times > 1:
            print(f"  The caption of the first is that of {times} of these {len(rows)}.")


if __name__ == "__main__":
    run_script(main)
