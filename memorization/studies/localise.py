"""Where in the picture: maps against known masks: ``python -m memorization.studies.localise --prompts LIST``

LIST has a column ``mask``: a picture that is white where a training image is copied; rows without one are left out
(where the whole picture is copied, there is nothing to find). Every prompt is generated, and each map of
memorization/localisation is compared with the mask, pixel by pixel: AUC, intersection over union of the region above
the map's own threshold (Otsu), and of as many of its highest pixels as the mask has. A second table, where the list
names training pictures (``image``), holds only pictures that are copies inside the mask (``--copied``). Intervals
resample families. A killed study goes on where it stopped.
"""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.ndimage import gaussian_filter

from memorization.errors import InputError
from memorization.evaluation.metrics import family_weights
from memorization.evaluation.regions import agreement
from memorization.flags import ArgumentParser, Arguments, add_flags, add_settings, assigned, names, run_script, value
from memorization.io.figures import draw_strips, enlarged, overlay
from memorization.io.files import write_atomically
from memorization.io.pictures import read_picture
from memorization.io.prompts import find_picture, picture_files, read_prompts
from memorization.launch import main_alone, shared
from memorization.localisation.base import MAPS, Map, make_maps
from memorization.models.loading import load_model, revision_of
from memorization.models.spec import find_model
from memorization.paths import ROOT, safe_name
from memorization.runs.localise import Located, Locator, save_located
from memorization.runs.memory import default_batch_size
from memorization.runs.processes import open_store
from memorization.settings import NotNegative, Positive
from memorization.studies.compare_report import print_table, resampled_mean
from memorization.studies.labelled import add_arguments

SHOWN = 12  # columns of the sheet


def masked_prompts(path: Path, split: str) -> pd.DataFrame:
    """Rows of a list that have a mask, with its file and that of the training picture under ``mask`` and ``picture``.

    Raises:
        InputError: there is no such column or file, or no row has a mask.
    """
    frame = read_prompts(path, ("mask",))
    if split != "all" and "split" in frame:
        frame = frame[frame["split"] == split]
    frame = frame[frame["mask"].fillna("").astype(str) != ""].reset_index(drop=True)
    if frame.empty:
        raise InputError(f"{path}: none of the {split} rows has a mask")
    masks = [find_picture(str(name), path.parent) for name in frame["mask"]]
    if None in masks:
        raise InputError(f"{path}: mask {frame['mask'][masks.index(None)]} is not there")
    return frame.assign(picture=picture_files(frame, path), mask=masks)


def read_mask(path: Path, size: tuple[int, int]) -> np.ndarray:
    """bool ``(height, width)``: where a picture is white rather than black.

    Raises:
        InputError: it is no picture, or white or black all over.
    """
    mask = read_picture(path, size).mean(2) > 127.5
    if mask.all() or not mask.any():
        raise InputError(f"{path}: is one colour all over; leave the mask empty where the whole picture is copied")
    return mask


def line_of(located: Located, mask: np.ndarray, training: Path | None, blur: float = 0.0) -> dict:
    """What is known of a prompt: of each map a value a picture, and how far the picture is from the training picture.

    Maps are smoothed by a Gaussian of ``blur`` latent pixels first. ``inside`` and ``outside`` the mask: root mean
    square differences of pixels, of a range of [0, 2].
    """
    line: dict = {"area": round(float(mask.mean()), 4)}
    for name, values in located.maps.items():
        smooth = [gaussian_filter(one, blur) for one in values]
        found = [agreement(enlarged(one, (mask.shape[0], mask.shape[1])), mask) for one in smooth]
        line |= {f"{name}: {key}": [round(one[key], 4) for one in found] for key in found[0]}
    if training is not None:
        gap = located.pictures.astype(float) - read_picture(training, (mask.shape[0], mask.shape[1]))
        square = (gap / 127.5) ** 2
        for where, region in (("inside", mask), ("outside", ~mask)):
            line[where] = np.sqrt(square[:, region].mean((1, 2))).round(4).tolist()
    return line


def table_of(rows: Sequence[dict], maps: Sequence[str], resamples: int, copied: float | None = None) -> pd.DataFrame:
    """A row a map, and one for the whole picture as the guess that looks at nothing.

    Args:
        copied: only pictures that are nearer than this to the training picture inside the mask; None for all.
    """
    kept = [[True] * len(row[f"{maps[0]}: auc"]) if copied is None else np.array(row.get("inside", [])) < copied
            for row in rows]  # fmt: skip
    chosen = [(row, np.flatnonzero(own)) for row, own in zip(rows, kept, strict=True) if np.any(own)]
    if not chosen:
        return pd.DataFrame()
    families = np.array([row.get("family", row["prompt"]) for row, _ in chosen])
    weights, found = family_weights(families, None, resamples), []
    for name in maps:
        line: dict = {"map": name, "pictures": sum(len(own) for _, own in chosen)}
        for key in ("auc", "iou", "iou at its area"):
            means = np.array([np.mean(np.array(row[f"{name}: {key}"])[own]) for row, own in chosen])
            line[key], line[f"{key} low"], line[f"{key} high"] = resampled_mean(means, weights)
        found.append(line)
    area = float(np.mean([row["area"] for row, _ in chosen]))
    return pd.DataFrame(
        [*found, {"map": "the whole picture", "pictures": found[0]["pictures"], "auc": 0.5, "iou": area}]
    )


def draw_sheet(frame: pd.DataFrame, folder: Path, maps: Sequence[str], path: Path) -> Path:
    """The first picture of each prompt: what it is a copy of, its mask, itself, and under each map."""
    shown: dict[str, list[np.ndarray]] = {}
    for number, row in frame.head(SHOWN).iterrows():
        picture = read_picture(folder / f"{number:04d}-0.png", None)
        size = (picture.shape[0], picture.shape[1])
        blank = np.full_like(picture, 255)
        shown.setdefault("training picture", []).append(
            read_picture(row["picture"], size) if row["picture"] is not None else blank
        )
        shown.setdefault("mask", []).append(read_picture(row["mask"], size))
        shown.setdefault("generated", []).append(picture)
        with np.load(folder / f"{number:04d}.npz") as kept:
            for name in maps:
                shown.setdefault(name, []).append(overlay(picture, kept[name][0]))
    return draw_strips(shown, path)


def parse(arguments: Arguments = None) -> argparse.Namespace:
    """The flags, checked."""
    parser = ArgumentParser(description=__doc__)
    add_arguments(parser)
    parser.set_defaults(split="all")
    add = parser.add_argument
    add("--maps", type=names, default=["all"], metavar="A,B|all", help=f"of {', '.join(MAPS)} (default: all)")
    add_settings(parser, "a map's setting, as in curvature.probes=4")
    add(
        "--blur",
        type=value(NotNegative),
        default=0.0,
        metavar="S",
        help="smooth the maps by a Gaussian of S latent pixels before they are compared (default: %(default)s)",
    )
    add("--copied", type=value(Positive), default=0.3, metavar="X",
        help="root mean square difference to the training picture inside the mask, of a range of 2, below which a "
             "picture is a copy there (default: %(default)s)")  # fmt: skip
    add_flags(parser, "--noises", default=4)
    add_flags(parser, "--steps", "--guidance-scale", "--resamples")
    args = parser.parse_args(arguments)
    settings: dict[str, dict[str, str]] = {}
    for text in args.assignments:
        (name, _, setting), given = assigned(text)[0].partition("."), assigned(text)[1]
        if name not in MAPS:
            raise InputError(f"--set {text}: write MAP.SETTING=VALUE, of {', '.join(MAPS)}")
        settings.setdefault(name, {})[setting] = given
    args.maps = make_maps(args.maps, settings)
    return args


@shared
def main(arguments: Arguments = None) -> None:
    """Locate, compare, print."""
    args = parse(arguments)
    maps: list[Map] = args.maps
    spec = find_model(args.model)
    path = args.prompts or spec.own_list()
    if path is None:
        raise InputError(f"model {spec.name!r} has no list of its own: give --prompts FILE")
    frame = masked_prompts(path, args.split)
    model = load_model(args.model, device=args.device, dtype=args.dtype, pictures=True, offload=args.offload)
    scale = spec.scale if args.guidance_scale is None else args.guidance_scale
    common = {"noises": args.noises, "seed": args.seed, "steps": args.steps, "guidance_scale": scale}
    settings = {
        "model": args.model, "revision": revision_of(model.pipe, pictures=True), "dtype": model.dtype, **common,
        "prompts": hashlib.sha256(path.read_bytes()).hexdigest(), "split": args.split,
        "maps": {one.name: one.record() for one in maps}, "blur": args.blur,
    }  # fmt: skip
    out = args.out or ROOT / "results" / "studies" / "localise" / safe_name(f"{spec.name}-{args.split}")
    with open_store(out, settings, {}) as store:
        if store.lacks(len(frame)):
            store.start()
            locate = Locator(model.pipe, maps, batch_size=default_batch_size(model.pipe), **common)
            for (number,) in store.batches(len(frame), 1):
                row = frame.loc[number]
                located = locate(row["prompt"])
                line = line_of(located, read_mask(row["mask"], located.pictures.shape[1:3]), row["picture"], args.blur)
                save_located(located, number, out / "maps")
                about = {key: row[key] for key in ("prompt", "family") if key in row}
                store.add([{"id": number, **about, **line}])
    main_alone()
    rows = store.rows
    named = [one.name for one in maps]
    for file, title, limit in (("table.csv", "all pictures", None), ("copied.csv", "copies alone", args.copied)):
        table = table_of(rows, named, args.resamples, limit)
        if not table.empty:
            write_atomically(out / file, table.round(4).to_csv(index=False))
            print(f"{title}:")
            print_table(table)
    print(draw_sheet(frame, out / "maps", named, out / "sheet.png"))


if __name__ == "__main__":
    run_script(main)
