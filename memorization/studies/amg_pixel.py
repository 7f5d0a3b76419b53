"""AMG on pixel-space models, unconditional and class-conditional: ``python -m memorization.studies.amg_pixel``

Pictures from the same noise without AMG, with a gate of two strengths, with a constant gate, without any (always
guided; the excess that dissimilarity grows with then counts from nL2 3) and looking at every step: how near they are
to the training set. AMG lowers the normalised l2 that it is measured by, so the cosine of CLIP features to the nearest
training picture stands beside it, and a Frechet distance on the same features, to pictures that the model never saw.
A killed study goes on where it stopped.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from memorization.errors import InputError
from memorization.flags import ArgumentParser, Arguments, run_script
from memorization.index.store import Index
from memorization.io.files import write_atomically
from memorization.io.pictures import to_bytes
from memorization.io.tables import markdown
from memorization.mitigations.amg import AMG
from memorization.models.devices import pick_device
from memorization.models.loading import revision_of
from memorization.models.pixel_diffusion import SAMPLERS, load_pixel_model, sample_pixels
from memorization.models.spec import find_model
from memorization.paths import ROOT
from memorization.runs.store import ResultStore
from memorization.similarity.clip import Clip
from memorization.studies.amg import gates
from memorization.studies.copying import Copying, Reference, training_pictures
from memorization.studies.gallery import Gallery

AT_ONCE = 32
LIMITS = {"nl2": (1.0, 1.4, 1.6), "clip": (0.9,)}  # 1.0: copies on the shipped models, by eye; 1.4 and 1.6: the paper's
SHOWN = 12  # pictures of the sheet


def variants(measure: str) -> dict[str, dict | None]:
    """Settings of AMG by the name of a row; None for plain sampling."""
    return {"base": None, "amg main": {}, "amg strong": {"strength": 1.13}, **gates(measure)}


def labels_of(index: Index, count: int) -> torch.Tensor:
    """A class a picture, as often as the classes occur in the index."""
    classes = sorted(set(index.captions))
    drawn = np.random.default_rng(0).choice(len(index), count)
    return torch.tensor([classes.index(index.captions[i]) for i in drawn])


def batches(pipe, args: argparse.Namespace, labels: torch.Tensor | None, amg: AMG | None) -> list:
    """How many pictures each batch of a row has, and what makes them."""

    def make(numbers: range) -> np.ndarray:
        return to_bytes(sample_pixels(
            pipe, numbers, labels=None if labels is None else labels[numbers.start : numbers.stop], seed=args.seed,
            sampler=args.sampler, steps=args.steps, guide=amg.pixel_guide() if amg else None,
        ))  # fmt: skip

    parts = [range(start, min(start + AT_ONCE, args.count)) for start in range(0, args.count, AT_ONCE)]
    return [(len(part), partial(make, part)) for part in parts]


def main(arguments: Arguments = None) -> None:
    parser = ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--model", default=str(ROOT / "testbed/models/pixel-uncond"), metavar="FOLDER|HUB_ID", help="in DDPM format")
    add("--index", type=Path, default=ROOT / "testbed/pixel-index", metavar="DIR", help="of its training set")
    add("--reference", type=Path, default=ROOT / "testbed/unseen-index", metavar="INDEX", help="pixels of pictures as "
        "they should look, for the Frechet distance (default: %(default)s)")  # fmt: skip
    add("--clip", default=find_model("testbed-eps").clip, metavar="FOLDER|HUB_ID", help="for the second measure")
    add("--preset", default="pixel-testbed", help="of memorization/configs/mitigations/amg.yaml (default: %(default)s)")
    add("--count", type=int, default=256, metavar="N", help="pictures (default: %(default)s)")
    add("--steps", type=int, default=25, help="of a generation (default: %(default)s)")
    add("--sampler", choices=list(SAMPLERS), default="ddim", help="default: %(default)s")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, ... (default: %(default)s)")
    add("--seed", type=int, default=0, help="default: %(default)s")
    add("--out", type=Path, metavar="DIR", help="default: results/local/amg/<model>-<sampler>")
    args = parser.parse_args(arguments)
    if args.count < 2 or not 2 <= args.steps <= 500 or args.seed < 0:
        parser.error("--count is at least 2, --steps from 2 to 500, --seed at least 0")
    nearest = AMG(index=str(args.index)).nearest()
    device = pick_device(args.device)
    pipe, clip = load_pixel_model(args.model, device), Clip(args.clip, device)
    side = pipe.unet.config.sample_size
    if nearest.index.size != (side, side):
        raise InputError(f"{args.index}: build it with --size {side} {side}, the size of the model's pictures")
    out = args.out or ROOT / "results/local/amg" / f"{Path(args.model).name}-{args.sampler}"
    settings = {
        "model": Path(args.model).name, **{name: vars(args)[name] for name in ("count", "steps", "sampler", "seed")},
        "revision": revision_of(pipe), "amg": AMG(index=str(args.index), preset=args.preset).record(),
    }  # fmt: skip
    classes, known = pipe.unet.config.num_class_embeds, len(set(nearest.index.captions))
    if classes and known > classes:
        raise InputError(f"{args.index}: its captions are the classes; there are {known}, the model has {classes}")
    labels = labels_of(nearest.index, args.count) if classes else None
    rows = settings["rows"] = variants(nearest.measure)
    with ResultStore(out, settings, {}) as store:
        gallery = Gallery(store)
        for name, changed in rows.items():
            amg = None if changed is None else AMG(index=str(args.index), preset=args.preset, **changed)
            gallery.fill(name, batches(pipe, args, labels, amg))
    pictures = {name: np.concatenate(list(gallery.batches(name))) for name in rows}
    training = training_pictures(nearest.index, nearest.index.size)
    reference = Reference(Index(args.reference), clip)
    copying = Copying(training, "clip", reference.embed, LIMITS)
    table = pd.DataFrame([
        {"row": name, **copying.columns(copying(made)), "Frechet": reference.distance(reference.embed(made)),
         "s / picture": gallery.seconds(name)}
        for name, made in pictures.items()
    ])  # fmt: skip
    print(markdown(table.round(3)))
    write_atomically(out / "table.csv", table.round(4).to_csv(index=False))
    closest = copying.distances(pictures["base"]).min(1).argsort()[:SHOWN]
    copying.sheet({name: made[closest] for name, made in pictures.items()}, out / "sheet.png")
    print(f"{out}/table.csv, sheet.png")


if __name__ == "__main__":
    run_script(main)
