"""Pictures as files, as bytes ``(n, h, w, 3)`` and as tensors ``(n, 3, h, w)`` in [-1, 1]."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image
from torch import Tensor

from memorization.errors import InputError
from memorization.io.prompts import read_prompts


def read_picture(path: Path, size: tuple[int, int] | None) -> np.ndarray:
    """uint8 ``(h, w, 3)``, brought to ``size`` (height, width) if given.

    Raises:
        InputError: the file is no picture.
    """
    try:
        picture = Image.open(path).convert("RGB")
        return np.asarray(picture.resize(size[::-1], Image.Resampling.LANCZOS) if size else picture)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(f"{path}: no picture that can be read ({error})") from None


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
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and path.is_file())
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
