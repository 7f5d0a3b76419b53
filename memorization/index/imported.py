"""Embeddings that clip-retrieval wrote, or any program that puts arrays beside tables, as an index.

Read are ``img_emb/*.npy`` and ``metadata/*.parquet`` (clip-retrieval), or ``.npy`` files with tables beside them: the
.parquet files of img2dataset's shards, .jsonl or .csv. A table tells of the rows of the array that bears its number.
"""

from __future__ import annotations

import csv
import importlib.util
import io
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from memorization.errors import InputError, printable
from memorization.index.descriptors import description
from memorization.index.store import Index
from memorization.index.writing import new_index
from memorization.io.files import line_of, parse_object, read_file

PATHS = ("image_path", "image", "file_name", "path", "url", "key")  # how tables name a picture; the first one counts
CAPTIONS = ("caption", "prompt", "text")
STATUS = "status"  # img2dataset's tables also tell of pictures that it could not fetch


def import_embeddings(
    source: Path, folder: Path, kind: str, model: str | None = None, *, at_once: int = 65536
) -> Index:
    """Write the index of embeddings that another program made; they become unit vectors.

    Args:
        source: the folder of the arrays and tables.
        kind: ``clip`` or ``sscd``.
        model: folder or hub id of the CLIP checkpoint that made them, which describes what is searched for. That it is
            the one is taken on trust: only its width can be compared.

    Raises:
        InputError: something is missing, damaged or does not belong together, or the folder holds an index.
    """
    _, record = description(kind, None, model)
    pairs = found(source)
    with new_index(folder, record) as (lines, vectors):
        for array, table in tqdm(pairs, printable(folder.name), unit="file"):
            embeddings, items = _open_array(array, record["width"]), _items(table)
            if len(items) != len(embeddings):
                raise InputError(f"{array}: {len(embeddings)} rows, but {table} tells of {len(items)}")
            for start in range(0, len(items), at_once):
                vectors.write(_unit(array, embeddings[start : start + at_once], start).tobytes())
                lines.writelines(map(line_of, items[start : start + at_once]))
    return Index(folder)


def found(source: Path) -> list[tuple[Path, Path]]:
    """Arrays and their tables, by their numbers.

    Raises:
        InputError: there is none, or one without the other.
    """
    arrays = _files(source / "img_emb", ".npy") or _files(source, ".npy")
    if not arrays:
        raise InputError(f"{source}: holds no .npy of embeddings, nor does its folder img_emb")
    homes = [home for home in (source / "metadata", arrays[0].parent) if home.is_dir()]
    tables = next((files for home in homes for ending in READERS if (files := _files(home, ending))), [])
    if not tables:
        raise InputError(f"{source}: no {', '.join(READERS)} tells of the pictures, beside the .npy or in metadata")
    if len(arrays) == len(tables) == 1:
        return [(arrays[0], tables[0])]
    numbered = {_number(table): table for table in tables}
    if lonely := [array for array in arrays if _number(array) not in numbered]:
        raise InputError(f"{lonely[0]}: no {tables[0].suffix} has its number")
    if len(numbered) < len(tables) or len({_number(array) for array in arrays}) < len(arrays):
        raise InputError(f"{source}: two files bear the same number")
    if len(arrays) < len(tables):
        left = next(table for number, table in numbered.items() if number not in set(map(_number, arrays)))
        raise InputError(f"{left}: no .npy has its number")
    return [(array, numbered[_number(array)]) for array in arrays]


def _files(folder: Path, ending: str) -> list[Path]:
    paths = folder.glob(f"*{ending}") if folder.is_dir() else ()
    return sorted(paths, key=lambda path: (_number(path) or 0, path.name))


def _number(path: Path) -> int | None:
    digits = re.findall(r"\d+", path.stem)
    return int(digits[-1]) if digits else None


def _open_array(path: Path, width: int) -> np.ndarray:
    """Memory-mapped, ``(rows, width)``."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"{path}: is no array that can be read ({error})") from None
    if not isinstance(array, np.ndarray) or array.ndim != 2 or array.dtype.kind != "f":
        raise InputError(f"{path}: holds no rows of floating point numbers")
    if array.shape[1] != width:
        raise InputError(f"{path}: rows of {array.shape[1]} numbers; the model that is named makes {width}")
    return array


def _unit(path: Path, rows: np.ndarray, start: int) -> np.ndarray:
    """Rows as unit vectors, float32; clip-retrieval writes half precision."""
    rows = rows.astype(np.float32)
    length = np.linalg.norm(rows, axis=1, keepdims=True)
    if (bad := ~(np.isfinite(length) & (length > 0))[:, 0]).any():
        raise InputError(f"{path}: row {start + bad.argmax()} has no direction: zeros, or not finite")
    return rows / length


def _items(table: Path) -> list[dict]:
    """A line of ``items.jsonl`` for every row."""
    rows = [row for row in READERS[table.suffix](table) if row.get(STATUS) in (None, "success")]
    names = [name for name in PATHS if rows and name in rows[0]]
    if rows and not names:
        raise InputError(f"{table}: no column names the pictures ({', '.join(PATHS)}); it has: {', '.join(rows[0])}")
    return [{"path": _text(row, names), "caption": _text(row, CAPTIONS)} for row in rows]


def _text(row: dict, names: Sequence[str]) -> str:
    value = next((row[name] for name in names if row.get(name) is not None), "")
    return value if isinstance(value, str) else str(value)


def _from_parquet(path: Path) -> list[dict]:
    if importlib.util.find_spec("pyarrow") is None:
        raise InputError(f"{path}: needs pyarrow (pip install pyarrow), or the same table as .jsonl or .csv")
    import pyarrow
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path) as file:
            known = [name for name in file.schema_arrow.names if name in (*PATHS, *CAPTIONS, STATUS)]
            return file.read(columns=known or None).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{path}: cannot be read ({error})") from None


def _from_jsonl(path: Path) -> Iterator[dict]:
    for number, line in enumerate(_text_of(path).split("\n"), 1):
        if line.strip():
            if (row := parse_object(line)) is None:
                raise InputError(f"{path}, line {number}: not a JSON object")
            yield row


def _from_csv(path: Path) -> list[dict]:
    try:
        return list(csv.DictReader(io.StringIO(_text_of(path), newline=""), strict=True))
    except csv.Error as error:
        raise InputError(f"{path}: malformed CSV: {error}") from None


def _text_of(path: Path) -> str:
    try:
        return read_file(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: byte {error.start} is not UTF-8") from None


READERS = {".parquet": _from_parquet, ".jsonl": _from_jsonl, ".csv": _from_csv}
