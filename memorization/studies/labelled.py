"""What studies of a model on a labelled list have in common."""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from local_sd_pipeline import LocalStableDiffusionPipeline
from memorization.detectors.base import Detector
from memorization.errors import InputError
from memorization.flags import add_flags
from memorization.io.prompts import read_prompts
from memorization.launch import main_alone
from memorization.models.loading import load_model, revision_of
from memorization.models.spec import ModelSpec, find_model
from memorization.paths import ROOT, safe_name
from memorization.runs.detect import run_detection
from memorization.runs.memory import default_batch_size
from memorization.runs.processes import open_store
from memorization.runs.scorer import Scorer


class Subject(NamedTuple):
    """A model, a labelled list (its file, and the chosen rows), and what the study's results depend on."""

    spec: ModelSpec
    pipe: LocalStableDiffusionPipeline
    listed: Path
    frame: pd.DataFrame
    settings: dict
    out: Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags that every such study has."""
    add_flags(parser, "--model", default="testbed-eps")
    add_flags(parser, "--prompts", help="a labelled list (default: the model's own)")
    # Settings are chosen on validation and confirmed on test.
    add_flags(parser, "--split", "--seed", "--dtype", "--device", "--offload")
    add_flags(parser, "--out", help="default: results/studies/<study>/<model>-<split>")


def open_subject(args: argparse.Namespace, study: str, *, pictures: bool = False) -> Subject:
    """Load what the flags name, with the autoencoder for ``pictures``.

    Raises:
        InputError: there is no such model or list, or the chosen rows hold one class only.
    """
    spec = find_model(args.model)
    path = args.prompts or spec.own_list()
    if path is None:
        raise InputError(f"model {spec.name!r} has no labelled list of its own: give --prompts FILE")
    frame = read_prompts(path)
    if args.split != "all" and "split" in frame:
        frame = frame[frame["split"] == args.split].reset_index(drop=True)
    if "label" not in frame or frame["label"].nunique() < 2:
        raise InputError(f"{path}: the {args.split} rows need labels of both classes, 0 and 1")
    model = load_model(args.model, device=args.device, dtype=args.dtype, pictures=pictures, offload=args.offload)
    settings = {
        "model": args.model, "revision": revision_of(model.pipe, pictures=pictures),
        "prompts": hashlib.sha256(path.read_bytes()).hexdigest(),
        "split": args.split, "seed": args.seed, "dtype": model.dtype,
    }  # fmt: skip
    out = args.out or ROOT / "results" / "studies" / study / safe_name(f"{spec.name}-{args.split}")
    return Subject(spec, model.pipe, path, frame, settings, out)


def scored(
    subject: Subject,
    detectors: Sequence[Detector],
    frame: pd.DataFrame,
    settings: Mapping[str, object],
    *,
    noises: int = 1,
    steps: int = 50,
) -> list[dict]:
    """The lines of a study's own detectors on the prompts of ``frame``, in the study's folder, from where it stopped.

    Of several processes the main one alone comes back.

    Args:
        settings: what the lines depend on, beside what the subject's do.
        noises: a prompt.
        steps: of the DDIM grid.
    """
    scale = subject.spec.scale
    settings = {**subject.settings, **settings, "guidance_scale": scale}
    scorer = partial(Scorer, subject.pipe, detectors, noises=noises, seed=subject.settings["seed"], steps=steps,
                     guidance_scale=scale)  # fmt: skip
    with open_store(subject.out, settings, {}) as store:
        run_detection(scorer, frame, store, batch_size=default_batch_size(subject.pipe), measure=True)
    main_alone()
    return store.rows
