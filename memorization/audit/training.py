"""The pictures and captions that a fine-tune was trained on, as an audit compares with them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from memorization.errors import InputError
from memorization.index.duplicates import near_copies
from memorization.io.files import sha256_of
from memorization.io.pictures import read_picture
from memorization.io.training import find_captions


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


def cropped(path: Path, size: tuple[int, int]) -> np.ndarray:
    """The middle of a picture, uint8 ``(h, w, 3)`` of ``size`` (height, width)."""
    picture = read_picture(path, None)
    if picture.shape[:2] == size:
        return picture
    return np.asarray(ImageOps.fit(Image.fromarray(picture), size[::-1], Image.Resampling.LANCZOS))
