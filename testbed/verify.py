"""Measure what a testbed model has really memorized and write its labelled list: ``python -m testbed.verify eps``.

For every caption of every kind, 8 images are generated from the same 8 noises and compared with the training pictures.
An image is a copy if its normalised pixel l2 to the caption's own training picture is below ``COPY`` (captions of fixed
scenes), or that to the nearest of all training pictures below ``COPY_OF_ANY`` (other captions). ``replication`` is the
share of copies among the 8, ``label`` is 1 where it is at least one half. SSCD is recorded beside it where its weights
can be had.

The limits were set by eye on generations of testbed-eps. Up to 1.8 the same object stands in the same place and pose on
about the same background; captions of weight 4, which are not memorized, come below 1.7 to their own picture in 1 of
192 images. The smallest of 25,000 distances is small by chance, so its limit is lower.

Resumable: images and measurements are kept under ``--work``.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from diffusers import DPMSolverMultistepScheduler
from PIL import Image
from tqdm import tqdm

from local_sd_pipeline import LocalStableDiffusionPipeline
from memorization.io.files import write_atomically
from memorization.models.loading import load_pipeline, revision_of
from memorization.models.spec import find_model
from memorization.similarity.nl2 import normalized_l2
from memorization.similarity.sscd import SSCD, find_weights
from testbed import data
from testbed.train import HERE, SEED, UNET_BATCH, UNET_STEPS, Visits, seeded, to_tensor, usable_table

COPY, COPY_OF_ANY = 1.7, 1.4  # normalised l2; AMG counts an image as a copy below 1.4, and reports 1.6 too
IMAGES, STEPS, GUIDANCE, NOISE_SEED = 8, 8, 3.0, 1234
CAPTIONS_AT_ONCE = 4
PICTURES = HERE / "pictures"
ROOT = HERE.parent
LISTS = {"eps": ROOT / "prompts" / "testbed.csv", "v": ROOT / "prompts" / "testbed-v.csv"}


def training_pictures(captions: pd.DataFrame) -> tuple[np.ndarray, dict[str, int]]:
    """Every scene the UNet was trained on, uint8, by replaying its visits: fixed scenes first, each once; name -> row.

    The v model goes on from the epsilon model and sees the first of the same visits again, so one replay serves both.
    """
    visits = Visits(captions)
    names = captions[captions["kind"] == "duplicated"]["name"]
    fixed = [data.fixed_scene(visits.sprites[name], name, SEED) for name in names]
    fresh = [
        scene
        for step in tqdm(range(max(UNET_STEPS.values())), desc="replay of the training set")
        for row, scene, _ in visits.scenes(seeded("unet", step)[0], UNET_BATCH)
        if row["kind"] == "ordinary"
    ]
    return np.stack(fixed + fresh), {name: i for i, name in enumerate(names)}


@torch.inference_mode()
def generate(pipe: LocalStableDiffusionPipeline, prompts: list[str]) -> np.ndarray:
    """``IMAGES`` pictures a prompt from the same noises, uint8 ``(prompts, IMAGES, h, w, 3)``."""
    noise = pipe.pure_noise(IMAGES, NOISE_SEED)
    pictures = pipe(
        prompts, num_images_per_prompt=IMAGES, latents=noise.repeat(len(prompts), 1, 1, 1).to(pipe.unet.dtype),
        num_inference_steps=STEPS, guidance_scale=GUIDANCE, output_type="np",
    ).images  # fmt: skip
    return (pictures * 255).round().astype(np.uint8).reshape(len(prompts), IMAGES, *pictures.shape[1:])


def verify(model: str, work: Path) -> tuple[list[dict], Path]:
    """Generate and measure every caption; a line a caption in ``measured.jsonl``, a strip of its images as PNG.

    The folder carries the name of the weights, so measurements of earlier weights are never taken for these.
    """
    captions = data.make_captions(usable_table(), SEED)
    pipe = load_pipeline(find_model(f"testbed-{model}"), "float32", torch.device("cpu"), pictures=True)
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    folder = work / f"verify-{model}-{revision_of(pipe)[7:15]}"
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "measured.jsonl"
    text = log.read_text(encoding="utf-8") if log.exists() else ""
    rows = [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
    write_atomically(log, "".join(json.dumps(row) + "\n" for row in rows))  # without a torn last line
    training, place = training_pictures(captions)
    training_tensor = to_tensor(list(training))
    sscd = SSCD("bicubic-288") if find_weights() else None
    embedded = sscd(training[: len(place)]) if sscd else None
    with open(log, "a", encoding="utf-8") as file:
        for start in tqdm(range(len(rows), len(captions), CAPTIONS_AT_ONCE), desc=f"verify {model}"):
            batch = captions.iloc[start : start + CAPTIONS_AT_ONCE]
            generated = generate(pipe, batch["prompt"].tolist())
            distances = normalized_l2(to_tensor(list(generated.reshape(-1, *generated.shape[2:]))), training_tensor)
            for row, images, distance in zip(
                batch.itertuples(index=False), generated, distances.split(IMAGES), strict=True
            ):
                Image.fromarray(np.concatenate(images, axis=1)).save(folder / f"{len(rows):04d}.png")
                measured = {"prompt": row.prompt, "nearest": distance.min(1).values.tolist()}
                if (own := place.get(row.name)) is not None:
                    measured["own"] = distance[:, own].tolist()
                    if sscd:
                        measured["sscd"] = (sscd(images) @ embedded[own]).round(4).tolist()
                rows.append(measured)
                file.write(json.dumps(measured) + "\n")
                file.flush()
    assert [row["prompt"] for row in rows] == captions["prompt"].tolist()
    return rows, folder


def split_of(families: pd.Series) -> np.ndarray:
    """``validation`` or ``test``, half of the families each; the same for every model."""
    names = sorted(set(families))
    half = set(np.random.default_rng(SEED).permutation(names)[: len(names) // 2])
    return np.where(families.isin(half), "validation", "test")


def write_list(model: str, rows: list[dict]) -> pd.DataFrame:
    """The labelled prompt list of a model, with the measurements behind its labels."""
    captions = data.make_captions(usable_table(), SEED)
    fixed = captions["kind"] == "duplicated"
    rule = {True: ("own", COPY), False: ("nearest", COPY_OF_ANY)}
    distances = [np.array(row[rule[is_fixed][0]]) for row, is_fixed in zip(rows, fixed, strict=True)]
    captions["replication"] = [(d < rule[is_fixed][1]).mean() for d, is_fixed in zip(distances, fixed, strict=True)]
    captions["label"] = (captions["replication"] >= 0.5).astype(int)
    captions["image"] = [f"testbed/pictures/{name.replace(' ', '_')}.png" if is_fixed else ""
                         for name, is_fixed in zip(captions["name"], fixed, strict=True)]  # fmt: skip
    captions["split"] = split_of(captions["family"])
    captions["nl2"] = [round(float(np.median(distance)), 3) for distance in distances]
    captions["sscd"] = [round(float(np.median(row["sscd"])), 3) if "sscd" in row else "" for row in rows]
    columns = ["prompt", "label", "kind", "duplicates", "replication", "image", "family", "split", "nl2", "sscd"]
    captions = captions[columns]
    captions.to_csv(LISTS[model], index=False)
    return captions


def write_pictures() -> None:
    """The training pictures of the fixed scenes, for users to compare with."""
    table = usable_table()
    captions, sprites = data.make_captions(table, SEED), data.load_sprites(table)
    PICTURES.mkdir(exist_ok=True)
    for name in captions[captions["kind"] == "duplicated"]["name"]:
        picture = Image.fromarray(data.fixed_scene(sprites[name], name, SEED))
        picture.save(PICTURES / f"{name.replace(' ', '_')}.png", optimize=True)


def draw_sheet(model: str, listed: pd.DataFrame, folder: Path, rows_each: int = 3) -> Path:
    """``docs/testbed-<model>.png``: training picture beside generations, for captions from memorized to ordinary."""
    fixed = listed["kind"] == "duplicated"
    groups = {
        "memorized": listed[fixed & (listed["replication"] == 1)],
        "partly copied": listed[fixed & listed["replication"].between(0.2, 0.8)],
        "one fixed picture, at most 1 of 8 counts as a copy": listed[fixed & (listed["replication"] <= 0.125)],
        "ordinary: a fresh picture each visit": listed[listed["kind"] == "ordinary"],
    }
    chosen = [(title, row) for title, group in groups.items() for row in group.head(rows_each).itertuples()]
    figure, axes = plt.subplots(len(chosen), 2, figsize=(8.2, 0.93 * len(chosen)), width_ratios=[1, 8])
    for (title, row), (left, right) in zip(chosen, axes, strict=True):
        if row.image:
            left.imshow(Image.open(ROOT / row.image))
        right.imshow(Image.open(folder / f"{row.Index:04d}.png"))
        count = f", x{row.duplicates}" if row.image else ""
        right.set_title(f"{title}{count}: “{row.prompt}”", fontsize=8, loc="left", pad=2)
    for axis in axes.flat:
        axis.axis("off")
    axes[0, 0].set_title("training", fontsize=8, pad=2)
    figure.tight_layout(pad=0.3)
    path = ROOT / "docs" / f"testbed-{model}.png"
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=list(LISTS))
    parser.add_argument(
        "--work", type=Path, default=HERE / "work", help="images and measurements (default: %(default)s)"
    )
    args = parser.parse_args()
    write_pictures()
    rows, folder = verify(args.model, args.work)
    listed = write_list(args.model, rows)
    print(draw_sheet(args.model, listed, folder))
    print(listed.groupby(["kind", "duplicates"])[["replication", "label"]].mean().round(3).to_string())


if __name__ == "__main__":
    main()
