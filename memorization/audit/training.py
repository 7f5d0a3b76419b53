"""The pictures and captions that a fine-tune was trained on, in the forms that trainers use.

A folder of pictures with a .txt (or .caption) beside each (kohya, in subfolders such as ``10_name`` too), with a
``metadata.jsonl`` or ``metadata.csv`` (diffusers; columns file_name, and text, prompt or caption), or such a list
itself, whose pictures lie beside it (column file_name or image).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image, ImageOps

from memorization.errors import InputError
from memorization.io.files import is_file, read_file, sha256_of, whole_lines
from memorization.io.pictures import SUFFIXES, read_picture, to_tensor
from memorization.similarity.nl2 import l2

LISTS = ("metadata.jsonl", "metadata.csv")
CAPTIONS = ("text", "prompt", "caption")
FILES = ("file_name", "image")
NEAR_COPY = 0.05  # l2 of pictures at 64 x 64, between 0 and 1: re-encoded or rescaled, but not another picture
THUMBNAIL = (64, 64)


@dataclass(frozen=True)
class Training:
    """Training pictures and their captions.

    Attributes:
        names: of the pictures, relative to their folder.
        pictures: uint8 ``(n, h, w, 3)``, cropped to the middle and brought to the model's size, as trainers do.
        families: ``(n,)``; near-copies of one picture share a number.
    """

    names: Sequence[str]
    files: Sequence[Path]
    captions: Sequence[str]
    pictures: np.ndarray
    families: np.ndarray

    def __len__(self) -> int:
        return len(self.names)

    @property
    def revision(self) -> str:
        """Tells pictures and captions from others."""
        digest = hashlib.sha256(self.pictures.tobytes())
        for name, caption in zip(self.names, self.captions, strict=True):
            digest.update(f"{name}\0{caption}\0".encode("utf-8", "backslashreplace"))
        return f"sha256:{digest.hexdigest()}"

    def hashes(self) -> list[str]:
        """sha256 of each file."""
        return [sha256_of(file) for file in self.files]


def read_training(source: Path, size: tuple[int, int]) -> Training:
    """Read a training folder or list.

    Args:
        size: (height, width) that pictures are brought to.

    Raises:
        InputError: there is nothing, one picture only, a picture that cannot be read, or one without a caption.
    """
    found = find_captions(source)
    if len(found) < 2:
        raise InputError(f"{source}: holds one picture only; an audit compares pictures, and needs two or more")
    home = source if source.is_dir() else source.parent
    pictures = np.stack([cropped(file, size) for file in found])
    names = [file.relative_to(home).as_posix() if file.is_relative_to(home) else str(file) for file in found]
    return Training(names, list(found), list(found.values()), pictures, near_copies(list(found)))


def find_captions(source: Path) -> dict[Path, str]:
    """Picture -> caption.

    Raises:
        InputError: no such folder or list, nothing in it, or a picture has no caption.
    """
    if not source.is_dir():
        return _from_list(source)
    if lists := [source / name for name in LISTS if is_file(source / name)]:
        return _from_list(lists[0])
    files = picture_files(source)
    found = {file: caption for file in files if (caption := _caption_beside(file))}
    if missing := [file for file in files if file not in found]:
        raise InputError(f"{source}: {len(missing)} of {len(files)} pictures have no caption, {missing[0].name} the "
                         f"first; write it into {missing[0].stem}.txt beside it, or all into metadata.jsonl")  # fmt: skip
    return found


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


def cropped(path: Path, size: tuple[int, int]) -> np.ndarray:
    """The middle of a picture, uint8 ``(h, w, 3)`` of ``size`` (height, width)."""
    picture = read_picture(path, None)
    if picture.shape[:2] == size:
        return picture
    return np.asarray(ImageOps.fit(Image.fromarray(picture), size[::-1], Image.Resampling.LANCZOS))


def near_copies(files: Sequence[Path], limit: float = NEAR_COPY) -> np.ndarray:
    """Numbers of families ``(n,)``: pictures whose l2 is below ``limit`` share one, and so do their near-copies."""
    thumbnails = to_tensor(np.stack([read_picture(file, THUMBNAIL) for file in files]))
    family = np.arange(len(files))
    for i, row in enumerate(l2(thumbnails, thumbnails).numpy()):
        for other in set(family[(row < limit)]) - {family[i]}:
            family[family == other] = family[i]
    return np.unique(family, return_inverse=True)[1]
