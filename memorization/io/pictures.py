"""Pictures as files, as bytes ``(n, h, w, 3)`` and as tensors ``(n, 3, h, w)`` in [-1, 1]."""

from __future__ import annotations

import io
import struct
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from memorization.errors import InputError
from memorization.io.files import is_file, read_file, replacing
from memorization.io.prompts import read_prompts

# What Pillow raises for damaged files.
UNREADABLE = (
    OSError, ValueError, SyntaxError, LookupError, TypeError, OverflowError, struct.error, Image.DecompressionBombError
)  # fmt: skip


def read_picture(path: Path, size: tuple[int, int] | None) -> np.ndarray:
    """uint8 ``(h, w, 3)``, the way up that the file says, brought to ``size`` (height, width) if given.

    Raises:
        InputError: the file is no picture.
    """
    content = read_file(path)
    try:
        picture = _in_bytes(ImageOps.exif_transpose(Image.open(io.BytesIO(content)))).convert("RGB")
        return np.asarray(picture.resize(size[::-1], Image.Resampling.LANCZOS) if size else picture)
    except UnidentifiedImageError:
        raise InputError(f"{path}: no picture that can be read (of no known format)") from None
    except UNREADABLE as error:
        raise InputError(f"{path}: no picture that can be read ({error})") from None


def _in_bytes(picture: Image.Image) -> Image.Image:
    """Grey values of 16 bits as ones of 8, which Pillow would cut off at 255 instead.

    Raises:
        ValueError: they are of 32 bits, whose white nobody knows.
    """
    if picture.mode.startswith("I;16"):
        return Image.fromarray(((np.asarray(picture).astype(np.uint32) + 128) // 257).astype(np.uint8))
    if picture.mode in ("I", "F"):
        raise ValueError("its grey values have 32 bits, so that nobody knows which is white")
    return picture


def save_picture(picture: np.ndarray, path: Path) -> None:
    """Write uint8 ``(h, w, 3)`` as a PNG, whole or not at all.

    Raises:
        InputError: it cannot be written.
    """
    with replacing(path) as part:
        Image.fromarray(picture).save(part, format="PNG")


def to_tensor(pictures: np.ndarray) -> Tensor:
    """uint8 ``(n, h, w, 3)`` -> float ``(n, 3, h, w)`` in [-1, 1]."""
    return torch.from_numpy(np.array(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1


def to_bytes(pictures: Tensor) -> np.ndarray:
    """uint8 ``(n, h, w, 3)`` of pictures ``(n, 3, h, w)``; what lies outside [-1, 1] is clipped."""
    return ((pictures / 2 + 0.5).clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()


SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}


def list_pictures(folder: Path) -> pd.DataFrame:
    """Pictures of ``folder`` in the order of their names: ``image`` (path) and ``prompt``.

    A ``metadata.jsonl`` beside them may give each ``file_name`` its ``prompt`` (or caption), ``label`` and ``family``;
    without one the prompt is empty.

    Raises:
        InputError: no such folder, no picture in it, or a picture that the metadata leaves out.
    """
    try:
        paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and is_file(path))
    except (OSError, ValueError) as error:
        raise InputError(f"{folder}: no such folder ({getattr(error, 'strerror', error)})") from None
    if not paths:
        raise InputError(f"{folder}: holds no picture ({', '.join(sorted(SUFFIXES))})")
    frame = pd.DataFrame({"image": [str(path) for path in paths], "prompt": ""})
    metadata = folder / "metadata.jsonl"
    if not metadata.exists():
        return frame
    known = read_prompts(metadata, ("file_name",)).set_index("file_name")
    if not known.index.is_unique:
        raise InputError(f"{metadata}: says two things of {known.index[known.index.duplicated()][0]}")
    if missing := [path.name for path in paths if path.name not in known.index]:
        raise InputError(f"{metadata}: says nothing of {missing[0]}")
    return known.loc[[path.name for path in paths]].assign(image=frame["image"].tolist()).reset_index(drop=True)
