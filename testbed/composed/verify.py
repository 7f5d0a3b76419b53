"""Measure what a model has really memorized and write its labelled list: ``python -m testbed.composed.verify eps``.

For every listed caption 8 pictures are made from the same 8 noises. A picture is a copy if what is fixed of its caption
is in it (captions of fixed pictures: nL2 of that part below ``COPY``, see copies.py), or if it is near to any verbatim
picture (other captions: AMG's nL2 among all training pictures below ``COPY_OF_ANY``). ``replication`` is the share of
copies among the 8, ``label`` is 1 where it is at least one half. Beside it stand SSCD, where its weights can be had,
what the judge sees (judge.py), and how much the 8 pictures differ from one another.

The limits were set by eye, on pairs from both sides of them.

Resumable: pictures and measurements are kept under ``--work``.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from diffusers import DPMSolverMultistepScheduler
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from local_sd_pipeline import LocalStableDiffusionPipeline
from memorization.io.files import LineFile, read_whole_lines
from memorization.models.loading import load_model
from memorization.similarity.nl2 import l2, normalized_l2
from memorization.similarity.sscd import SSCD, find_weights
from testbed.composed import scenes
from testbed.composed.captions import FIXED, make_captions
from testbed.composed.copies import copy_distance, fresh_scenes
from testbed.composed.judge import Judge
from testbed.composed.scenes import NAMED, random_scenes
from testbed.composed.train import HERE, MODELS, digest, to_unit

COPY, COPY_OF_ANY = 1.2, 0.9
PICTURES, STEPS, GUIDANCE, NOISE_SEED = 8, 10, 3.0, 1234
OTHERS = 4000  # fresh scenes that stand for the training pictures that are not fixed
AT_ONCE = 4  # captions
ROOT = HERE.parent.parent
SHOWN = HERE / "pictures"
LISTS = {name: HERE / f"testbed-{name}.csv" for name in ("eps", "v")}


def fixed_pictures() -> tuple[pd.DataFrame, np.ndarray]:
    """The listed captions and a picture of what is fixed of each, uint8 ``(captions, h, w, 3)``.

    Where the background alone is fixed, the picture shows it without an object; where the object alone is, one of its
    backgrounds is behind it.
    """
    captions, rows = make_captions()
    bare = (captions["kind"] == "background").to_numpy()
    pictures = torch.where(torch.from_numpy(bare)[:, None, None, None], scenes.draw(rows, objects=False),
                           scenes.draw(rows))  # fmt: skip
    return captions, pictures.permute(0, 2, 3, 1).numpy()


@torch.inference_mode()
def generate(pipe: LocalStableDiffusionPipeline, prompts: list[str]) -> np.ndarray:
    """``PICTURES`` a prompt from the same noises, uint8 ``(prompts, PICTURES, h, w, 3)``."""
    noise = pipe.pure_noise(PICTURES, NOISE_SEED)
    made = pipe(
        prompts, num_images_per_prompt=PICTURES, latents=noise.repeat(len(prompts), 1, 1, 1).to(pipe.unet.dtype),
        num_inference_steps=STEPS, guidance_scale=GUIDANCE, output_type="np",
    ).images  # fmt: skip
    return (made * 255).round().astype(np.uint8).reshape(len(prompts), PICTURES, *made.shape[1:])


class Measure:
    """Everything that is recorded of a caption's pictures."""

    def __init__(self) -> None:
        self.captions, shown = fixed_pictures()
        _, self.rows = make_captions()
        self.judge = Judge(MODELS / "clip")
        verbatim = self.captions.index[self.captions["kind"] == "verbatim"]
        others = scenes.draw(random_scenes(np.random.default_rng(17), OTHERS))
        self.training = torch.cat([torch.from_numpy(shown[verbatim]).permute(0, 3, 1, 2), others])
        self.verbatim = len(verbatim)
        self.sscd = SSCD("official-288") if find_weights() else None
        self.features = self.sscd(shown) if self.sscd else None

    def __call__(self, number: int, pictures: np.ndarray) -> dict:
        """A line of ``measured.jsonl`` of caption ``number`` and its pictures, uint8 ``(n, h, w, 3)``."""
        kind, row = self.captions["kind"][number], self.rows[number]
        unit = to_unit(torch.from_numpy(pictures).permute(0, 3, 1, 2))
        right = self.judge(unit) == torch.as_tensor(row[: len(NAMED)], dtype=torch.long)
        nearest = normalized_l2(unit, self.training)[:, : self.verbatim].amin(1)
        line = {"prompt": self.captions["prompt"][number], "nearest": rounded(nearest),
                "right": right.float().mean(0).tolist(), "spread": spread(unit, row)}  # fmt: skip
        if kind in FIXED:
            line["own"] = rounded(copy_distance(unit, row, kind))
            if self.features is not None:
                line["sscd"] = rounded(torch.from_numpy(self.sscd(pictures) @ self.features[number]))
        return line


def rounded(values: Tensor) -> list[float]:
    return [round(value, 4) for value in values.tolist()]


def spread(pictures: Tensor, row: np.ndarray) -> float:
    """How much pictures differ from one another, where fresh scenes of the same caption differ by 1."""

    def mean_distance(these: Tensor) -> float:
        table = l2(these, these)
        return table.sum().item() / (len(table) * (len(table) - 1))

    return round(mean_distance(pictures) / mean_distance(to_unit(scenes.draw(fresh_scenes(row, 32, 3)))), 4)


def verify(name: str, work: Path) -> tuple[list[dict], Path]:
    """Generate and measure every caption; a line a caption in ``measured.jsonl``, a strip of its pictures as PNG.

    The folder carries the name of the weights, so measurements of earlier weights are never taken for these.
    """
    model = load_model(str(MODELS / f"testbed-{name}"), device="cpu", dtype="float32")
    model.pipe.scheduler = DPMSolverMultistepScheduler.from_config(model.pipe.scheduler.config)
    folder = work / f"verify-{name}-{digest(MODELS / f'testbed-{name}' / 'unet')}"
    measure = Measure()
    rows, size = read_whole_lines(folder / "measured.jsonl", f"remove {folder}")
    file = LineFile(folder / "measured.jsonl", "another process is measuring")
    file.cut(size)
    prompts = measure.captions["prompt"].tolist()
    for start in tqdm(range(len(rows), len(prompts), AT_ONCE), desc=f"verify {name}"):
        made = generate(model.pipe, prompts[start : start + AT_ONCE])
        for number, pictures in enumerate(made, start):
            Image.fromarray(np.concatenate(pictures, axis=1)).save(folder / f"{number:04d}.png")
            rows.append(measure(number, pictures))
            file.append(rows[-1:])
    file.close()
    assert [row["prompt"] for row in rows] == prompts
    return rows, folder


def write_list(name: str, rows: list[dict]) -> pd.DataFrame:
    """The labelled prompt list of a model, with the measurements behind its labels."""
    listed, _ = make_captions()
    fixed = listed["kind"].isin(list(FIXED)).to_numpy()
    nl2 = [np.array(row["own"] if is_fixed else row["nearest"]) for row, is_fixed in zip(rows, fixed, strict=True)]
    limits = np.where(fixed, COPY, COPY_OF_ANY)
    listed["replication"] = [(d < limit).mean() for d, limit in zip(nl2, limits, strict=True)]
    listed["label"] = (listed["replication"] >= 0.5).astype(int)
    listed["image"] = [
        f"testbed/composed/pictures/{slug(t)}.png" if f else "" for t, f in zip(listed["title"], fixed, strict=True)
    ]
    listed["family"] = listed["title"]  # no two captions share a title or a combination
    listed["nl2"] = [round(float(np.median(d)), 3) for d in nl2]
    listed["sscd"] = [round(float(np.median(row["sscd"])), 3) if "sscd" in row else "" for row in rows]
    listed = listed[["prompt", "label", "kind", "visits", "replication", "image", "family", "split", "nl2", "sscd",
                     *NAMED]]  # fmt: skip
    listed.to_csv(LISTS[name], index=False)
    return listed


def slug(title: str) -> str:
    return title.lower().replace(" ", "-")


def write_pictures() -> None:
    """What is fixed of each caption, for users to compare with; and the fixed objects' masks, white where they are."""
    captions, shown = fixed_pictures()
    _, rows = make_captions()
    SHOWN.mkdir(exist_ok=True)
    masks = (scenes.object_alpha(rows) * 255).round().byte().numpy()
    for title, kind, picture, mask in zip(captions["title"], captions["kind"], shown, masks, strict=True):
        if kind in FIXED:
            Image.fromarray(picture).save(SHOWN / f"{slug(title)}.png", optimize=True)
        if kind == "object":
            Image.fromarray(mask).save(SHOWN / f"{slug(title)}-mask.png", optimize=True)


def table_of_truth(listed: pd.DataFrame) -> pd.DataFrame:
    """Share of copies and of captions labelled 1, by kind and visits."""
    table = listed.groupby(["kind", "visits"]).agg(
        captions=("label", "size"), copies=("replication", "mean"), labelled_1=("label", "mean"), nl2=("nl2", "median")
    )
    return table.round(3).reset_index()


def summary(listed: pd.DataFrame, rows: list[dict]) -> Iterator[dict]:
    """Classifier's score and spread by kind."""
    values = pd.DataFrame([[*row["right"], row["spread"]] for row in rows], columns=[*NAMED, "spread"])
    for kind, part in values.groupby(listed["kind"]):
        yield {"kind": kind, **part[list(NAMED)].mean().round(3), "spread": round(part["spread"].median(), 3)}


def sheet_rows(listed: pd.DataFrame, each: int = 3) -> Iterator[tuple[str, int]]:
    """Title and number of the captions that a sheet shows."""
    copied, partly = listed["replication"] >= 0.9, listed["replication"].between(0.2, 0.8)
    groups = {
        "one fixed picture, copied": (listed["kind"] == "verbatim") & copied,
        "one fixed picture, partly copied": (listed["kind"] == "verbatim") & partly,
        "one fixed picture, not copied": (listed["kind"] == "verbatim") & (listed["replication"] == 0),
        "fixed object, copied": (listed["kind"] == "object") & copied,
        "fixed background, copied": (listed["kind"] == "background") & copied,
        "ordinary": listed["kind"] == "ordinary",
        "held out": listed["kind"] == "held-out",
    }
    for title, members in groups.items():
        yield from ((title, int(number)) for number in np.flatnonzero(members)[:: max(1, members.sum() // each)][:each])


def draw_sheet(name: str, listed: pd.DataFrame, folder: Path) -> Path:
    """``testbed-<name>.png``: training picture beside eight generations, from memorized to held out."""
    chosen = list(sheet_rows(listed))
    figure, axes = plt.subplots(len(chosen), 2, figsize=(8.2, 1.02 * len(chosen)), width_ratios=[1, PICTURES])
    for (title, number), (left, right) in zip(chosen, axes, strict=True):
        row = listed.loc[number]
        if row["image"]:
            left.imshow(Image.open(ROOT / row["image"]))
        right.imshow(Image.open(folder / f"{number:04d}.png"))
        right.set_title(f"{title}, {row['visits']} visits: “{row['prompt']}”", fontsize=8, loc="left", pad=2)
    for axis in axes.flat:
        axis.axis("off")
    axes[0, 0].set_title("training", fontsize=8, pad=2)
    figure.tight_layout(pad=0.3)
    path = HERE / f"testbed-{name}.png"
    figure.savefig(path, dpi=100)
    plt.close(figure)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=list(LISTS))
    parser.add_argument("--work", type=Path, default=HERE / "work", help="pictures and measurements (%(default)s)")
    args = parser.parse_args()
    write_pictures()
    rows, folder = verify(args.model, args.work)
    listed = write_list(args.model, rows)
    out = HERE / "results" / args.model
    out.mkdir(parents=True, exist_ok=True)
    table_of_truth(listed).to_csv(out / "truth.csv", index=False)
    pd.DataFrame(summary(listed, rows)).to_csv(out / "drawing.csv", index=False)
    print(draw_sheet(args.model, listed, folder))
    print(table_of_truth(listed).to_string(index=False))
    print(pd.DataFrame(summary(listed, rows)).to_string(index=False))


if __name__ == "__main__":
    main()
