"""Prompt lists: read them, and put their prompts into families."""

from __future__ import annotations

import csv
import hashlib
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from memorization.errors import InputError
from memorization.io.families import near_copy_families
from memorization.io.files import is_file, parse_object, read_file
from memorization.paths import ROOT

OPTIONAL = ("label", "family", "kind", "duplicates", "replication", "image", "split")
# How published lists name what we call prompt and kind.
ALIASES = {"caption": "prompt", "type": "kind", "overfit_type": "kind"}
SURROGATE = re.compile("[\ud800-\udfff]")  # half of a letter, as a damaged JSON file may name it


class Listed(NamedTuple):
    """What a run is about.

    Attributes:
        frame: a row a prompt or picture.
        hashes: role -> sha256 of what it was read from: tells the list from others.
    """

    frame: pd.DataFrame
    hashes: dict[str, str]


def read_prompts(path: str | Path, extra: Sequence[str] = ()) -> pd.DataFrame:
    """Read a ``.txt`` (a prompt a line), ``.csv`` (``,`` or ``;``) or ``.jsonl`` list.

    Args:
        extra: further columns to keep, which the list must have.

    Returns:
        A frame with ``prompt`` (str) and those of ``OPTIONAL`` that the list has; ``label`` is 0 or 1. Blank lines of a
        ``.txt`` are skipped and counted in ``frame.attrs["blank_lines"]``; in the other formats a prompt may be empty.

    Raises:
        InputError: the file is missing, empty, not UTF-8, malformed, or has no ``prompt`` column.
    """
    path = Path(path)
    text = _read_text(path)
    readers = {".txt": _read_txt, ".csv": _read_csv, ".jsonl": _read_jsonl}
    if path.suffix not in readers:
        raise InputError(f"{path}: prompt lists are .txt, .csv or .jsonl files, not '{path.suffix}'")
    frame = readers[path.suffix](path, text)
    blank_lines = frame.attrs.get("blank_lines", 0)
    frame.columns = _columns(path, frame.columns, extra)
    if "prompt" not in frame:
        raise InputError(f"{path}: no column 'prompt' (or 'caption'); it has: {', '.join(frame.columns)}")
    if missing := [column for column in extra if column not in frame]:
        raise InputError(f"{path}: no column {missing[0]!r}; it has: {', '.join(frame.columns)}")
    frame = frame[["prompt", *(c for c in OPTIONAL if c in frame), *extra]].reset_index(drop=True)
    if frame.empty:
        raise InputError(f"{path}: holds no prompt")
    if not (is_text := frame["prompt"].map(_is_text)).all():
        row = is_text.idxmin()
        raise InputError(f"{path}: the prompt in row {row + 1} is no text: {repr(frame['prompt'][row])[:80]}")
    for column in frame.columns[1:]:
        if (nested := frame[column].map(lambda cell: isinstance(cell, (list, dict))).to_numpy()).any():
            raise InputError(f"{path}: the {column} in row {nested.argmax() + 1} is no text or number")
    if "label" in frame:
        frame["label"] = _labels(path, frame["label"])
    if "split" in frame and not frame["split"].isin(["validation", "test"]).all():
        raise InputError(f"{path}: the column 'split' holds something other than validation and test")
    for column in {"duplicates", "replication"} & set(frame):
        frame[column] = _numbers(frame[column])
    frame.attrs["blank_lines"] = blank_lines
    return frame


def ordinary(path: Path) -> tuple[list[str], list[str] | None]:
    """The prompts of a list that are not memorized, of the validation half where it has halves, and their families.

    Families are None where the list does not name them.

    Raises:
        InputError: there is none.
    """
    frame = read_prompts(path)
    if "label" in frame:
        frame = frame[frame["label"] == 0]
    if "split" in frame:
        frame = frame[frame["split"] == "validation"]
    if frame.empty:
        raise InputError(f"{path}: holds no prompt with label 0 (of the validation half, where it has halves)")
    return frame["prompt"].tolist(), frame["family"].tolist() if "family" in frame else None


def read_pair(memorized: str | Path, non_memorized: str | Path) -> pd.DataFrame:
    """A labelled list from two: every prompt of the first gets label 1, of the second 0; keeps the columns of both."""
    parts = [read_prompts(memorized).assign(label=1), read_prompts(non_memorized).assign(label=0)]
    shared = [column for column in parts[0] if column in parts[1]]
    parts = [part[shared] for part in parts]
    frame = pd.concat(parts, ignore_index=True)
    frame.attrs["blank_lines"] = sum(part.attrs["blank_lines"] for part in parts)
    return frame


def read_lists(files: Mapping[str, Path]) -> Listed:
    """The prompts of ``{"prompts": FILE}`` or ``{"memorized": FILE, "non_memorized": FILE}``, with families.

    Raises:
        InputError: as :func:`read_prompts`.
    """
    if "prompts" in files:
        frame = read_prompts(files["prompts"])
    else:
        frame = read_pair(files["memorized"], files["non_memorized"])
    hashes = {role: hashlib.sha256(read_file(Path(path))).hexdigest() for role, path in files.items()}
    return Listed(with_families(frame), hashes)


def listed(prompts: Sequence[str] | pd.DataFrame | str | Path) -> Listed:
    """The same of a list in memory (texts, or a frame with a column ``prompt``), or of one file.

    Raises:
        InputError: there is no prompt, or no such file.
    """
    if isinstance(prompts, (str, Path)):
        return read_lists({"prompts": Path(prompts)})
    frame = prompts.reset_index(drop=True) if isinstance(prompts, pd.DataFrame) else pd.DataFrame({"prompt": prompts})
    if "prompt" not in frame or frame.empty or not frame["prompt"].map(_is_text).all():
        raise InputError("prompts: texts, a frame with a column 'prompt', or a file; at least one prompt")
    return Listed(with_families(frame.copy()), {"prompts": hashlib.sha256(frame.to_csv().encode()).hexdigest()})


def sample(listed: Listed, count: int) -> Listed:
    """``count`` prompts of a list, in its order: by their sha256, so always the same ones, however they are ordered.

    Of a labelled list the memorized prompts come first, up to a half, since they are few as a rule.
    """
    frame = listed.frame
    digests = frame["prompt"].map(lambda prompt: hashlib.sha256(prompt.encode()).hexdigest())
    order = digests.sort_values(kind="stable").index
    if "label" in frame:
        memorized = frame.loc[order, "label"] == 1
        few, rest = order[memorized], order[~memorized]
        order = few[: max(count // 2, count - len(rest))].append(rest)
    chosen = frame.loc[sorted(order[:count])].reset_index(drop=True)
    return Listed(chosen, {**listed.hashes, "sample": str(count)})


def with_families(frame: pd.DataFrame) -> pd.DataFrame:
    """A labelled list that does not name the family of every prompt gets all of them, by near-copies."""
    if "label" in frame and ("family" not in frame or (frame["family"].isna() | (frame["family"] == "")).any()):
        frame["family"] = near_copy_families(frame["prompt"].tolist())
    return frame


def _columns(path: Path, names: Iterable[object], extra: Sequence[str]) -> list[str]:
    """The names of a list's columns as ours.

    Raises:
        InputError: two that are read have one name.
    """
    found = [str(name).strip().lower() for name in names]
    for old, new in ALIASES.items():
        if new not in found:
            found = [new if name == old else name for name in found]
    if twice := [name for name in ("prompt", *OPTIONAL, *extra) if found.count(name) > 1]:
        raise InputError(f"{path}: has more than one column {twice[0]!r}")
    return found


def _read_text(path: Path) -> str:
    try:
        text = read_file(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: byte {error.start} is not UTF-8; convert the file to UTF-8") from None
    if not text.strip():
        raise InputError(f"{path}: the file is empty")
    return text


def _read_txt(path: Path, text: str) -> pd.DataFrame:
    lines = [line.strip() for line in text.removesuffix("\n").split("\n")]  # not splitlines: prompts may hold U+2028
    frame = pd.DataFrame({"prompt": [line for line in lines if line]})
    frame.attrs["blank_lines"] = len(lines) - len(frame)
    return frame


def _read_csv(path: Path, text: str) -> pd.DataFrame:
    header = text.split("\n", 1)[0]
    separator = ";" if header.count(";") > header.count(",") else ","
    try:
        names, *rows = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    except csv.Error as error:
        raise InputError(f"{path}: malformed CSV: {error}") from None
    rows = [row for row in rows if row]
    if ragged := [number for number, row in enumerate(rows, 1) if len(row) != len(names)]:
        count = len(rows[ragged[0] - 1])
        raise InputError(
            f"{path}: malformed CSV: row {ragged[0]} has {count} cells, the header {len(names)}; quote commas"
        )
    return pd.DataFrame(rows, columns=names)


def _read_jsonl(path: Path, text: str) -> pd.DataFrame:
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        if (row := parse_object(line)) is None:
            raise InputError(f"{path}, line {number}: not a JSON object")
        rows.append(row)
    return pd.DataFrame(rows)


def _is_text(prompt: object) -> bool:
    return isinstance(prompt, str) and not SURROGATE.search(prompt)


def _labels(path: Path, labels: pd.Series) -> pd.Series:
    numbers = _numbers(labels)
    wrong = ~numbers.isin([0, 1]).to_numpy()
    if wrong.any():
        raise InputError(f"{path}: label {labels[wrong].iloc[0]!r} in row {wrong.argmax() + 1} is not 0 or 1")
    return numbers.astype(int)


def _numbers(cells: pd.Series) -> pd.Series:
    """Cells as numbers; NaN where they are none."""
    try:
        return pd.to_numeric(cells, errors="coerce")
    except (TypeError, ValueError, OverflowError):  # a whole number of hundreds of digits
        return cells.map(lambda cell: float("nan"))


def picture_files(frame: pd.DataFrame, listed: Path) -> list[Path | None]:
    """The training picture of each row, by its column ``image``.

    Raises:
        InputError: a file is not there.
    """
    names = frame["image"].fillna("").astype(str) if "image" in frame else [""] * len(frame)
    found = [find_picture(name, listed.parent) if name else None for name in names]
    if missing := [name for name, path in zip(names, found, strict=True) if name and path is None]:
        raise InputError(f"{listed}: training picture {missing[0]} is not there")
    return found


def find_picture(name: str, home: Path) -> Path | None:
    """The file that a list in the folder ``home`` names: beside the list, here, or in the project."""
    places = (home / name, Path(name), ROOT / name)
    return next((place for place in places if is_file(place)), None)
