"""AMG on pixel-space models, unconditional and class-conditional: ``python -m memorization.studies.amg_pixel``

Pictures from the same noise without AMG, with a gate of two strengths, with a constant gate, without any (always
guided; the excess that dissimilarity grows with then counts from nL2 3) and looking at every step: how near they are
to the training set. AMG lowers the normalised l2 that it is measured by, so the cosine of CLIP features to the nearest
training picture stands beside it, and a Frechet distance on the same features, to pictures that the model never saw.
A killed study goes on where it stopped.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from diffusers import DDPMPipeline

from memorization.errors import InputError
from memorization.flags import ArgumentParser, Arguments, add_flags, run_script, value
from memorization.index.store import Index
from memorization.io.pictures import to_bytes
from memorization.mitigations.amg import AMG
from memorization.models.devices import pick_device
from memorization.models.loading import revision_of
from memorization.models.pixel_diffusion import SAMPLERS, load_pixel_model, sample_pixels
from memorization.models.spec import find_model
from memorization.paths import ROOT
from memorization.runs.store import ResultStore
from memorization.settings import Bounds
from memorization.similarity.clip import Clip
from memorization.similarity.frechet import Reference
from memorization.similarity.judge import Judge, TrainingPictures, copy_limits
from memorization.studies.amg import MAIN, STRONG, gates
from memorization.studies.compare import PLAIN, Batch, Comparison, Item, Made, Row
from memorization.studies.compare_report import draw_sheet, print_table, write_report

AT_ONCE = 32
LIMITS = {"nl2": 1.0, "clip_image": 0.9}  # of a copy, on the shipped models; nl2 by eye


def rows_of(amg: AMG) -> list[Row]:
    """The rows of the table, by AMG and what is changed of it."""
    changed = {MAIN: {}, STRONG: {"strength": 1.13}, **gates(amg.nearest().measure)}
    return [Row(PLAIN, PLAIN), *(Row(name, name, replace(amg, **own)) for name, own in changed.items())]


def labels_of(index: Index, count: int) -> torch.Tensor:
    """A class a picture, as often as the classes occur in the index."""
    classes = sorted(set(index.captions))
    drawn = np.random.default_rng(0).choice(len(index), count)
    return torch.tensor([classes.index(index.captions[i]) for i in drawn])


def batches(
    pipe: DDPMPipeline, args: argparse.Namespace, labels: torch.Tensor | None, judge: Judge, row: Row
) -> Sequence[Batch]:
    """What makes the pictures of a row; an item is a picture."""
    amg = row.mitigation if isinstance(row.mitigation, AMG) else None

    def make(numbers: range) -> list[Made]:
        started = time.perf_counter()
        pictures = to_bytes(sample_pixels(
            pipe, numbers, labels=None if labels is None else labels[numbers.start : numbers.stop], seed=args.seed,
            sampler=args.sampler, steps=args.steps, guide=amg.pixel_guide() if amg else None,
        ))  # fmt: skip
        seconds, values = round((time.perf_counter() - started) / len(numbers), 4), judge(pictures)
        return [
            Made(pictures[i : i + 1], {**{name: [column[i]] for name, column in values.items()},
                                       "seconds_generation": seconds})
            for i in range(len(numbers))
        ]  # fmt: skip

    parts = [range(start, min(start + AT_ONCE, args.count)) for start in range(0, args.count, AT_ONCE)]
    return [Batch([Item(None, 1, str(number)) for number in part], partial(make, part)) for part in parts]


def parse(arguments: Arguments = None) -> argparse.Namespace:
    """The flags, checked."""
    parser = ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--model", default=str(ROOT / "testbed/models/pixel-uncond"), metavar="FOLDER|HUB_ID", help="in DDPM format")
    add("--index", type=Path, default=ROOT / "testbed/pixel-index", metavar="DIR", help="of its training set")
    add("--reference", type=Path, default=ROOT / "testbed/unseen-index", metavar="INDEX", help="pixels of pictures as "
        "they should look, for the Frechet distance (default: %(default)s)")  # fmt: skip
    add("--clip", default=find_model("testbed-eps").clip, metavar="FOLDER|HUB_ID", help="for the second measure")
    add("--preset", default="pixel-testbed", help="of memorization/configs/mitigations/amg.yaml (default: %(default)s)")
    add("--count", type=value(Annotated[int, Bounds(2)]), default=256, metavar="N", help="pictures (default: "
        "%(default)s)")  # fmt: skip
    add_flags(parser, "--steps", default=25, help="of a generation (default: %(default)s)")
    add("--sampler", choices=list(SAMPLERS), default="ddim", help="default: %(default)s")
    add_flags(parser, "--device", "--resamples")
    add_flags(parser, "--seed", default=0, help="of the noise (default: %(default)s)")
    add("--out", type=Path, metavar="DIR", help="default: results/local/amg/<model>-<sampler>")
    return parser.parse_args(arguments)


def main(arguments: Arguments = None) -> None:
    args = parse(arguments)
    amg, device = AMG(index=str(args.index), preset=args.preset), pick_device(args.device)
    index, pipe, clip = amg.nearest().index, load_pixel_model(args.model, device), Clip(args.clip, device)
    classes, known = pipe.unet.config.num_class_embeds, len(set(index.captions))
    if classes and known > classes:
        raise InputError(f"{args.index}: its captions are the classes; there are {known}, the model has {classes}")
    side, seen = pipe.unet.config.sample_size, Index(args.reference)
    judge = Judge(TrainingPictures(index.pictures((side, side))), clip)
    out = args.out or ROOT / "results/local/amg" / f"{Path(args.model).name}-{args.sampler}"
    settings = {
        "model": Path(args.model).name, **{name: vars(args)[name] for name in ("count", "steps", "sampler", "seed")},
        "revision": revision_of(pipe), "judge": judge.description, "index": index.digest,
    }  # fmt: skip
    labels, rows = labels_of(index, args.count) if classes else None, rows_of(amg)
    with ResultStore(out, settings, {}) as store:
        reference = Reference(seen.pictures(seen.size or (side, side)), clip)
        comparison = Comparison(store, copy_limits(LIMITS), reference)
        for row in rows:
            comparison.fill(row, batches(pipe, args, labels, judge, row))
        items = [item for batch in batches(pipe, args, labels, judge, rows[0]) for item in batch.items]
        draw_sheet(comparison, [row.name for row in rows[1:]], items, judge, out / "sheet.png")
    print_table(write_report(out, args.resamples, settings["model"]).drop(columns=["method"]))
    print(f"{out}/table.csv, sheet.png")


if __name__ == "__main__":
    run_script(main)
