"""Training pictures and their captions on disk, in the forms that trainers use.

A folder of pictures with a .txt (or .caption) beside each (kohya, in subfolders such as ``10_name`` too), with a
``metadata.jsonl`` or ``metadata.csv`` (diffusers; columns file_name, and text, prompt or caption), or such a list
itself, whose pictures lie beside it (column file_name or image).
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from memorization.errors import InputError
from memorization.io.files import is_file, read_file, whole_lines
from memorization.io.pictures import SUFFIXES

LISTS = ("metadata.jsonl", "metadata.csv")
CAPTIONS = ("text", "prompt", "caption")
FILES = ("file_name", "image")


def find_captions(source: Path) -> dict[Path, str]:
    """Picture -> caption.

    Raises:
        InputError: no such folder or list, nothing in it, or a picture has no caption.
    """
    found = pictures_of(source)
    if missing := [file for file, caption in found.items() if not caption]:
        raise InputError(f"{source}: {len(missing)} of {len(found)} pictures have no caption, {missing[0].name} the "
                         f"first; write it into {missing[0].stem}.txt, or all into metadata.jsonl")  # fmt: skip
    return found


def pictures_of(source: Path) -> dict[Path, str]:
    """Picture -> caption, which is empty where a picture of a folder has none.

    Raises:
        InputError: no such folder or list, or nothing in it.
    """
    if not source.is_dir():
        return _from_list(source)
    if lists := [source / name for name in LISTS if is_file(source / name)]:
        return _from_list(lists[0])
    return {file: _caption_beside(file) for file in picture_files(source)}


def picture_files(folder: Path) -> list[Path]:
    """Pictures of a folder and those in it, in the order of their names.

    Raises:
        InputError: there are none.
    """
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and is_file(path))
    if not files:
        raise InputError(f"{folder}: holds no picture ({', '.join(sorted(SUFFIXES))})")
    return files


def _caption_beside(file: Path) -> str:
    for suffix in (".txt", ".caption"):
        if is_file(path := file.with_suffix(suffix)):
            return " ".join(read_file(path).decode("utf-8", "replace").split())
    return ""


def _from_list(path: Path) -> dict[Path, str]:
    rows = _rows(path)
    columns = {key for row in rows for key in row}
    file_column, text_column = (next((name for name in known if name in columns), None) for known in (FILES, CAPTIONS))
    if file_column is None or text_column is None:
        raise InputError(f"{path}: needs a column {' or '.join(FILES)} and one of {', '.join(CAPTIONS)}; "
                         f"it has: {', '.join(sorted(columns)) or 'none'}")  # fmt: skip
    found = {}
    for number, row in enumerate(rows, 1):
        name, caption = row.get(file_column), row.get(text_column)
        if not isinstance(name, str) or not name:
            continue  # a line of a list that has no picture
        if not isinstance(caption, str) or not caption.strip():
            raise InputError(f"{path}: row {number} ({name}) has no caption")
        if not is_file(path.parent / name):
            raise InputError(f"{path}: row {number} names {name}, which is no file in {path.parent}")
        found[path.parent / name] = caption
    if not found:
        raise InputError(f"{path}: names no picture")
    return found


def _rows(path: Path) -> list[dict]:
    if path.suffix == ".jsonl":
        read_file(path)
        return list(whole_lines(path, "mend it"))
    if path.suffix != ".csv":
        raise InputError(f"{path}: no such folder; the training pictures are a folder, a .jsonl or a .csv")
    read_file(path)
    try:
        return pd.read_csv(path, dtype=str, keep_default_na=False).to_dict("records")
    except (ValueError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({' '.join(str(error).split())[:120]})") from None
