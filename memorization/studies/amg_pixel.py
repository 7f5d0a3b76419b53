"""AMG on pixel-space models, unconditional and class-conditional: ``python -m memorization.studies.amg_pixel``

Pictures from the same noise without AMG, with a gate of two strengths, with a constant gate and without any (always
guided): how near they are to the training set. AMG lowers the normalised l2 that it is measured by, so the cosine of
CLIP features to the nearest training picture stands beside it, and a Frechet distance on the same features, to the
pictures of the index, each counted once. Every finished row keeps its pictures as one PNG, from which the table is made
again: a killed study goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import time
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image

from memorization.errors import ArgumentParser, InputError, run_script
from memorization.index import Index
from memorization.mitigations.amg import AMG
from memorization.models import ROOT, find_model, pick_device, revision_of
from memorization.pictures import to_bytes, to_tensor
from memorization.pixel_diffusion import SAMPLERS, amg_guide, load_pixel_model, sample_pixels
from memorization.plots import save_figure
from memorization.results import read_json, write_atomically
from memorization.similarity.clip import Clip
from memorization.similarity.frechet import frechet_distance
from memorization.similarity.nearest import Nearest
from memorization.studies.amg import gates
from memorization.tables import markdown


def variants(measure: str) -> dict[str, dict | None]:
    """Settings of AMG by the name of a row; None for plain sampling."""
    return {"none": None, "main": {}, "strong": {"strength": 1.13}, **gates(measure)}


def labels_of(index: Index, count: int) -> torch.Tensor:
    """A class a picture, as often as the classes occur in the index."""
    classes = sorted(set(index.captions))
    drawn = np.random.default_rng(0).choice(len(index), count)
    return torch.tensor([classes.index(index.captions[i]) for i in drawn])


def generated(name: str, settings: dict | None, pipe, args: argparse.Namespace, labels, out: Path) -> np.ndarray:
    """The pictures of a variant, uint8 ``(count, h, w, 3)``: made, or read from ``out`` where they are there."""
    side = pipe.unet.config.sample_size
    columns = int(np.ceil(args.count**0.5))
    path = out / f"{name.replace(' ', '-')}.png"
    if not path.exists():
        amg = settings is not None and AMG(index=str(args.index), preset=args.preset, **settings)
        started = time.perf_counter()
        pictures = to_bytes(sample_pixels(
            pipe, args.count, labels=labels, sampler=args.sampler, steps=args.steps, seed=args.seed, name=name,
            guide_of=partial(amg_guide, amg) if amg else None,
        ))  # fmt: skip
        seconds = (time.perf_counter() - started) / args.count
        blank = np.zeros((columns * columns - len(pictures), side, side, 3), np.uint8)
        rows = np.concatenate([pictures, blank]).reshape(columns, columns, side, side, 3)
        mosaic = Image.fromarray(rows.transpose(0, 2, 1, 3, 4).reshape(columns * side, columns * side, 3))
        write_atomically(out / f"{path.stem}.json", json.dumps({"seconds": round(seconds, 4)}) + "\n")
        mosaic.save(path.with_suffix(".new"), "PNG")
        path.with_suffix(".new").replace(path)
    tiles = np.asarray(Image.open(path)).reshape(columns, side, columns, side, 3).transpose(0, 2, 1, 3, 4)
    return tiles.reshape(-1, side, side, 3)[: args.count]


def measured(pictures: np.ndarray, nearest: Nearest, clip: Clip, training: np.ndarray) -> dict:
    """What a row of the table holds of one variant."""
    tensors = to_tensor(pictures)
    rows = torch.cat([nearest.find(part) for part in tensors.split(64)])
    nl2 = -torch.cat([nearest.nearness(*part) for part in zip(tensors.split(64), rows.split(64), strict=True)]).numpy()
    features = clip.pictures(pictures).numpy()
    cosine = (features * training[rows[:, 0]]).sum(1)
    found = {
        "nl2 5%": np.quantile(nl2, 0.05), "nl2 lowest": nl2.min(),
        "nl2 < 1.4": (nl2 < 1.4).mean(), "nl2 < 1.6": (nl2 < 1.6).mean(),
        "clip cosine 95%": np.quantile(cosine, 0.95), "clip cosine > .9": (cosine > 0.9).mean(),
        "Frechet": frechet_distance(features, training),
    }  # fmt: skip
    return {name: float(value) for name, value in found.items()}


def draw(chosen: dict[str, np.ndarray], nearest: Nearest, path: Path, count: int = 12) -> None:
    """Nearest training picture | plain | each variant, for the ``count`` plain pictures that are nearest."""
    import matplotlib.pyplot as plt

    tensors = to_tensor(chosen["none"])
    rows = nearest.find(tensors)
    order = nearest.nearness(tensors, rows).argsort(descending=True)[:count]
    training = to_bytes(nearest.index.vectors(rows[order, 0].tolist()).unflatten(1, tensors.shape[1:]))
    strips = {"nearest training picture": training, **{name: made[order.numpy()] for name, made in chosen.items()}}
    figure, axes = plt.subplots(len(strips), 1, figsize=(count * 0.75, len(strips) * 0.95))
    for axis, (name, pictures) in zip(axes, strips.items(), strict=True):
        axis.imshow(np.concatenate(list(pictures), axis=1))
        axis.set_title(name, fontsize=8, loc="left", pad=2)
        axis.axis("off")
    save_figure(figure, path)


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--model", default=str(ROOT / "testbed/models/pixel-uncond"), metavar="FOLDER|HUB_ID", help="in DDPM format")
    add("--index", type=Path, default=ROOT / "testbed/pixel-index", metavar="DIR", help="of its training set")
    add("--clip", default=find_model("testbed-eps").clip, metavar="FOLDER|HUB_ID", help="for the second measure")
    add("--preset", default="pixel-testbed", help="of configs/mitigations/amg.yaml (default: %(default)s)")
    add("--count", type=int, default=256, metavar="N", help="pictures (default: %(default)s)")
    add("--steps", type=int, default=50, help="of a generation (default: %(default)s)")
    add("--sampler", choices=list(SAMPLERS), default="ddim", help="default: %(default)s")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, ... (default: %(default)s)")
    add("--seed", type=int, default=0, help="default: %(default)s")
    add("--out", type=Path, metavar="DIR", help="default: results/studies/amg_pixel/<model>-<sampler>")
    args = parser.parse_args()
    if args.count < 2 or args.steps < 2 or args.seed < 0:
        parser.error("--count and --steps are at least 2, --seed at least 0")
    nearest = AMG(index=str(args.index)).nearest()
    device = pick_device(args.device)
    pipe, clip = load_pixel_model(args.model, device), Clip(args.clip, device)
    side = pipe.unet.config.sample_size
    if nearest.index.size != (side, side):
        raise InputError(f"{args.index}: build it with --size {side} {side}, the size of the model's pictures")
    out = args.out or ROOT / "results/studies/amg_pixel" / f"{Path(args.model).name}-{args.sampler}"
    settings = {
        name: str(vars(args)[name]) for name in ("model", "index", "preset", "count", "steps", "sampler", "seed")
    }
    settings |= {"model": Path(args.model).name, "revision": revision_of(pipe), "index": nearest.index.digest}
    settings["terms"] = vars(AMG(preset=args.preset).terms(nearest.measure))
    out.mkdir(parents=True, exist_ok=True)
    if (out / "settings.json").exists() and read_json(out / "settings.json") != settings:
        raise InputError(f"{out} holds pictures of other settings; choose another --out")
    write_atomically(out / "settings.json", json.dumps(settings, indent=1) + "\n")
    labels = labels_of(nearest.index, args.count) if pipe.unet.config.num_class_embeds else None
    chosen = {
        name: generated(name, values, pipe, args, labels, out) for name, values in variants(nearest.measure).items()
    }
    pictures = nearest.index.vectors(slice(None)).unflatten(1, (3, *nearest.index.size))
    training = clip.pictures(to_bytes(pictures)).numpy()
    table = pd.DataFrame([
        {"guidance": name, **measured(made, nearest, clip, training),
         "seconds": read_json(out / f"{name.replace(' ', '-')}.json")["seconds"]}
        for name, made in chosen.items()
    ])  # fmt: skip
    print(markdown(table.round(3)))
    write_atomically(out / "table.csv", table.round(4).to_csv(index=False))
    draw(chosen, nearest, out / "sheet.png")
    print(f"{out}/table.csv, sheet.png")


if __name__ == "__main__":
    run_script(main)
