"""Score pictures instead of prompts, with the detectors that need a picture alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from tqdm import tqdm

from local_sd_pipeline import LocalStableDiffusionPipeline
from memorization.detection import KEPT, as_rows, with_memory
from memorization.detectors import Detector
from memorization.errors import InputError
from memorization.pictures import encode_pixels, read_picture, to_tensor
from memorization.predictor import Predictor
from memorization.prompts import read_prompts
from memorization.results import ResultStore

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}


def list_images(folder: Path) -> pd.DataFrame:
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


@torch.no_grad()
def encode(pipe: LocalStableDiffusionPipeline, paths: Sequence[str]) -> Tensor:
    """Scaled latents ``(images, c, h, w)``, float32, of pictures brought to the model's size; the posterior's mean.

    Raises:
        InputError: a file is no picture.
    """
    size = pipe.unet.config.sample_size
    height, width = (side * pipe.vae_scale_factor for side in ((size, size) if isinstance(size, int) else size))
    pictures = np.stack([read_picture(Path(path), (height, width)) for path in paths])
    return encode_pixels(pipe.vae, to_tensor(pictures))


@torch.no_grad()
def run_images(
    pipe: LocalStableDiffusionPipeline,
    images: pd.DataFrame,
    detectors: Sequence[Detector],
    store: ResultStore,
    *,
    batch_size: int,
    at_once: int = 4,
) -> None:
    """Score the pictures of :func:`list_images` into ``store``, from where it stopped, ``at_once`` together."""
    if store.done < len(images):
        store.start()
        with_memory(lambda size: _score_all(pipe, images, detectors, store, size, at_once), store, batch_size)


def _score_all(pipe, images: pd.DataFrame, detectors, store: ResultStore, batch_size: int, at_once: int) -> None:
    keep = [column for column in KEPT if column in images]
    empty = pipe.embed([""])
    first = store.done // at_once * at_once
    for start in tqdm(range(first, len(images), at_once), desc=store.folder.name, unit=f"{at_once} pictures"):
        batch = images.iloc[start : start + at_once]
        predict = Predictor(pipe, pipe.embed(batch["prompt"].tolist()), empty, batch_size)
        clean, values = encode(pipe, batch["image"].tolist()), {}
        for detector in detectors:
            values |= {name: value[:, None] for name, value in detector(clean, predict).items()}
        scores = as_rows(values, batch["image"].tolist())
        rows = [
            {"id": start + i, "prompt": row["prompt"], "image": Path(row["image"]).name,
             **{column: row[column] for column in keep}, **score}
            for i, (row, score) in enumerate(zip(batch.to_dict("records"), scores, strict=True))
        ]  # fmt: skip
        store.append(rows[store.done - start :])
