"""What studies of a model on a labelled list have in common."""

from __future__ import annotations

import argparse
import hashlib
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from memorization.errors import InputError
from memorization.io.prompts import read_prompts
from memorization.models.devices import DTYPES, pick_device, pick_dtype
from memorization.models.loading import load_pipeline, revision_of
from memorization.models.registry import ModelSpec, find_model
from memorization.paths import ROOT


class Subject(NamedTuple):
    """A model, a labelled list, and what the study's results depend on."""

    spec: ModelSpec
    pipe: object
    frame: pd.DataFrame
    settings: dict
    out: Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags that every such study has."""
    add = parser.add_argument
    add("--model", default="testbed-eps", metavar="NAME|FOLDER|HUB_ID", help="default: %(default)s")
    add("--prompts", type=Path, metavar="FILE", help="a labelled list (default: the model's own)")
    # Settings are chosen on validation and confirmed on test.
    add("--split", choices=["validation", "test", "all"], default="validation",
        help="rows of the list, where it has splits (default: %(default)s)")  # fmt: skip
    add("--seed", type=int, default=51, help="of the noise (default: %(default)s)")
    add("--dtype", choices=list(DTYPES), help="default: the model's config, else by hardware")
    add("--device", default="auto")
    add("--out", type=Path, metavar="DIR", help="default: results/studies/<study>/<model>-<split>")


def open_subject(args: argparse.Namespace, study: str, *, pictures: bool = False) -> Subject:
    """Load what the flags name, with the autoencoder for ``pictures``.

    Raises:
        InputError: there is no such model or list, or the chosen rows hold one class only.
    """
    spec = find_model(args.model)
    path = args.prompts or (ROOT / spec.prompts["prompts"] if "prompts" in spec.prompts else None)
    if path is None:
        raise InputError(f"model {spec.name!r} has no labelled list of its own: give --prompts FILE")
    frame = read_prompts(path)
    if args.split != "all" and "split" in frame:
        frame = frame[frame["split"] == args.split].reset_index(drop=True)
    if "label" not in frame or frame["label"].nunique() < 2:
        raise InputError(f"{path}: the {args.split} rows need labels of both classes, 0 and 1")
    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype or spec.dtype, device)
    pipe = load_pipeline(spec, dtype, device, pictures=pictures)
    settings = {
        "model": args.model, "revision": revision_of(pipe), "prompts": hashlib.sha256(path.read_bytes()).hexdigest(),
        "split": args.split, "seed": args.seed, "dtype": dtype,
    }  # fmt: skip
    out = args.out or ROOT / "results" / "studies" / study / f"{spec.name}-{args.split}"
    return Subject(spec, pipe, frame, settings, out)
