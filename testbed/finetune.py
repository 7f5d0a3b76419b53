"""Mitigation by training, on testbed-eps: ``python -m testbed.finetune ablated`` and ``... filtered``.

- ``ablated``: under a memorized caption the UNet learns to predict what the frozen model predicts under the ordinary
  caption nearest to it by text (Kumari et al., "Ablating Concepts in Text-to-Image Diffusion Models", ICCV 2023), on
  noisy pictures that the frozen model made of that neighbour.
- ``filtered``: as in Wen et al., ICLR 2024, section 5.2, the model is fine-tuned on pictures that are new to it and
  come again and again among ordinary ones; once as usual (``plain``), and once leaving out every visit whose guidance
  vector, at the visit's own noisy latents, is longer than a limit: what is being memorized is not learnt further.
  Deviation: the limit is by default the length below which 90% of the ordinary visits lie before fine-tuning (theirs
  is tried out), and it holds from the first step on.

Then the share of copies and the text alignment are measured, before and after. Resumable; the models stay under
``--work``.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
from diffusers.models.attention_processor import AttnProcessor
from PIL import Image
from torch import Tensor
from torch.nn.functional import mse_loss, normalize
from tqdm import tqdm

from local_sd_pipeline import LocalStableDiffusionPipeline
from memorization.io.figures import draw_strips
from memorization.io.pictures import read_picture
from memorization.io.prompts import read_prompts
from memorization.models.generation import generate as generate_latents
from memorization.models.loading import load_pipeline
from memorization.models.spec import ModelSpec, find_model
from memorization.paths import ROOT
from memorization.similarity.clip import Clip
from memorization.similarity.judge import Judge, TrainingPictures, is_copy
from testbed import data
from testbed.fit import fit
from testbed.train import (
    HERE,
    MODELS,
    SEED,
    UNET_BATCH,
    Visits,
    digest,
    empty_share,
    save_pipeline,
    seeded,
    usable_table,
)
from testbed.verify import CAPTIONS_AT_ONCE, GUIDANCE, LISTS, generate

STEPS = 400
START = MODELS / "testbed-eps"
NEW_PICTURES, NEW_SHARE = 24, 0.5  # pictures that are new to the model, and their share of the visits


def load(folder: Path, **options) -> LocalStableDiffusionPipeline:
    """A testbed model in float32."""
    return load_pipeline(ModelSpec(str(folder), (str(folder),)), "float32", torch.device("cpu"), **options)


def tune(pipe: LocalStableDiffusionPipeline, loss_of: Callable, steps: int, peak: float, folder: Path, recipe: str):
    """Fine-tune the UNet of ``pipe`` and save the whole model as ``folder/model``."""
    pipe.unet.to(memory_format=torch.channels_last).requires_grad_(True)
    pipe.unet.set_attn_processor(AttnProcessor())
    recipe = f"{recipe}, {steps} steps, from {digest(START / 'unet')}"
    fit(pipe.unet, loss_of, steps=steps, peak=peak, folder=folder, recipe=recipe)
    scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    save_pipeline(pipe.unet, pipe.text_encoder, pipe.tokenizer, scheduler, folder / "model")


# ---------------------------------------------------------------- concept ablation
def nearest_ordinary(pipe: LocalStableDiffusionPipeline, listed: pd.DataFrame) -> dict[str, str]:
    """Memorized caption -> the ordinary caption with the nearest mean text state."""
    memorized = listed[listed["label"] == 1]["prompt"].tolist()
    ordinary = listed[(listed["kind"] == "ordinary") & (listed["label"] == 0)]["prompt"].tolist()
    with torch.no_grad():
        left, right = (normalize(pipe.embed(prompts).mean(1), dim=1) for prompts in (memorized, ordinary))
    return {prompt: ordinary[i] for prompt, i in zip(memorized, (left @ right.T).argmax(1).tolist(), strict=True)}


def anchor_latents(pipe: LocalStableDiffusionPipeline, anchors: list[str]) -> dict[str, Tensor]:
    """Latents ``(4, c, h, w)`` of four pictures that the model makes of each anchor."""
    found, empty, noise = {}, pipe.embed([""]), pipe.pure_noise(4, 7)
    for anchor in tqdm(anchors, desc="pictures of the neighbours"):
        embeds = pipe.embed([anchor]).expand(4, -1, -1)
        with torch.no_grad():
            *_, last = generate_latents(pipe, embeds, empty, noise, steps=10, guidance_scale=GUIDANCE)
        found[anchor] = last.after
    return found


def ablate(work: Path, steps: int) -> None:
    """Fine-tune memorized captions towards their neighbours."""
    frozen, pipe = load(START), load(START)
    neighbour = nearest_ordinary(frozen, read_prompts(LISTS["eps"]))
    memorized, anchors = list(neighbour), sorted(set(neighbour.values()))
    made = anchor_latents(frozen, anchors)
    with torch.no_grad():
        embedded = dict(zip([*memorized, *anchors], frozen.embed([*memorized, *anchors]), strict=True))

    def loss_of(step: int) -> Tensor:
        rng, generator = seeded("ablated", step)
        prompts = [memorized[i] for i in rng.integers(len(memorized), size=UNET_BATCH)]
        latents = torch.stack([made[neighbour[prompt]][rng.integers(4)] for prompt in prompts])
        noise = torch.randn(latents.shape, generator=generator)
        t = torch.randint(1000, (UNET_BATCH,), generator=generator)
        noisy = frozen.scheduler.add_noise(latents, noise, t)
        with torch.no_grad():
            target = frozen.unet(noisy, t, torch.stack([embedded[neighbour[prompt]] for prompt in prompts])).sample
        return mse_loss(pipe.unet(noisy, t, torch.stack([embedded[prompt] for prompt in prompts])).sample, target)

    tune(pipe, loss_of, steps, 1e-4, work / "ablated", "ablated")


# ---------------------------------------------------------------- training with a filter
class FineTuning:
    """Visits of new pictures among the usual ones, and the length of the guidance vector on them."""

    def __init__(self, pipe: LocalStableDiffusionPipeline, captions: pd.DataFrame, new: pd.DataFrame) -> None:
        self.pipe, self.visits, self.new = pipe, Visits(captions), new["prompt"].tolist()
        self.latents = self.visits.encode([np.asarray(Image.open(ROOT / path)) for path in new["image"]])
        prompts = ["", *captions["prompt"]]
        with torch.no_grad():
            self.embedded = dict(zip(prompts, pipe.embed(prompts), strict=True))

    def batch(self, step: int, share: float = NEW_SHARE) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Noisy latents, timesteps, text states, the noise, and which rows have a caption, of a step.

        The first ``share`` of the rows are new.
        """
        rng, generator = seeded("finetune", step)
        count, empty = round(UNET_BATCH * share), empty_share("finetune", 0, 1)
        usual, prompts = self.visits.draw(rng, UNET_BATCH - count, empty)
        chosen = rng.integers(len(self.new), size=count)
        drawn = ["" if rng.random() < empty else self.new[i] for i in chosen] + prompts
        latents = torch.cat([self.latents[chosen], usual])
        noise = torch.randn(latents.shape, generator=generator)
        t = torch.randint(1000, (UNET_BATCH,), generator=generator)
        noisy = self.pipe.scheduler.add_noise(latents, noise, t)
        captioned = torch.tensor([prompt != "" for prompt in drawn])
        return noisy, t, torch.stack([self.embedded[prompt] for prompt in drawn]), noise, captioned

    @torch.no_grad()
    def length(self, noisy: Tensor, t: Tensor, output: Tensor) -> Tensor:
        """|| eps_c - eps_u || of every row, given eps_c."""
        uncond = self.pipe.unet(noisy, t, self.embedded[""].expand(len(noisy), -1, -1)).sample
        return (output - uncond).flatten(1).norm(dim=1)

    @torch.no_grad()
    def usual_length(self, share: float = 0.9, batches: int = 16) -> float:
        """The length below which a ``share`` of the usual visits with a caption lies."""
        found = []
        for step in range(batches):
            noisy, t, text, _, captioned = self.batch(step, 0)
            found.append(self.length(noisy, t, self.pipe.unet(noisy, t, text).sample)[captioned])
        return torch.cat(found).quantile(share).item()

    def loss_of(self, limit: float) -> Callable[[int], Tensor]:
        """The loss of a step, over the visits whose guidance vector is not longer than ``limit``."""

        def loss(step: int) -> Tensor:
            noisy, t, text, noise, _ = self.batch(step)
            output = self.pipe.unet(noisy, t, text).sample
            if limit == np.inf:
                return mse_loss(output, noise)
            kept = self.length(noisy, t, output.detach()) <= limit
            return ((output - noise).square().mean((1, 2, 3)) * kept).sum() / kept.sum().clamp_min(1)

        return loss


def new_pictures(captions: pd.DataFrame, folder: Path) -> pd.DataFrame:
    """``NEW_PICTURES`` held-out captions, each with one fixed scene that is written into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    sprites = data.load_sprites(data.emoji_table())
    new = captions[captions["kind"] == "held-out"].sample(NEW_PICTURES, random_state=SEED).reset_index(drop=True)
    new["image"] = [str(folder.resolve() / f"{name.replace(' ', '_')}.png") for name in new["name"]]
    for name, path in zip(new["name"], new["image"], strict=True):
        Image.fromarray(data.fixed_scene(sprites[name], name, SEED)).save(path)
    return new.assign(kind="new")


def train_filtered(work: Path, steps: int, norm: float | None, new: pd.DataFrame, captions: pd.DataFrame) -> None:
    """The fine-tuned models ``plain`` and ``filtered``."""
    for name in ("plain", "filtered"):
        pipe = load(START)
        tuning = FineTuning(pipe, captions, new)
        limit = np.inf if name == "plain" else norm or tuning.usual_length()
        print(f"{name}: visits with a guidance vector up to {limit:.3f} are learnt")
        tune(pipe, tuning.loss_of(limit), steps, 5e-4, work / name, f"{name}, up to {limit:.4f}")


# ---------------------------------------------------------------- what came of it
def replication(folder: Path, listed: pd.DataFrame, pictures: list[str]) -> tuple[pd.DataFrame, list[np.ndarray]]:
    """Per caption: share of copies among 8 pictures, text alignment, kind; and the first of the pictures.

    Args:
        pictures: of every caption that has a fixed one.
    """
    spec = find_model("testbed-eps")
    pipe = load(folder, pictures=True)
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    known = TrainingPictures.read([ROOT / image for image in pictures], (64, 64))
    judge = Judge(known, Clip(spec.clip))
    found, first = [], []
    for start in tqdm(range(0, len(listed), CAPTIONS_AT_ONCE), desc=f"verify {folder.parent.name}/{folder.name}"):
        batch = listed.iloc[start : start + CAPTIONS_AT_ONCE]
        for row, made in zip(batch.itertuples(), generate(pipe, batch["prompt"].tolist()), strict=True):
            values = judge(made, row.prompt, ROOT / row.image if row.image else None)
            copied = is_copy("nl2", np.array(values["nl2"]), spec.copy_limits["nl2"])
            copies = copied.mean() if row.image else np.nan
            found.append({"kind": row.kind, "copies": copies, "clip": np.mean(values["clip"])})
            first.append(made[0])
    return pd.DataFrame(found), first


def compare(models: dict[str, Path], listed: pd.DataFrame, pictures: list[str], sheet: Path) -> pd.DataFrame:
    """Means by kind, for every model; ``sheet`` gets a picture of each model for some captions of each kind."""
    tables, firsts = zip(*(replication(path, listed, pictures) for path in models.values()), strict=True)
    chosen = listed.reset_index(drop=True).groupby("kind").head(6).sort_values("kind")
    training = [read_picture(ROOT / image, (64, 64)) if image else np.full((64, 64, 3), 255, np.uint8)
                for image in chosen["image"]]  # fmt: skip
    strips = {"training": training}
    strips |= {name: [first[i] for i in chosen.index] for name, first in zip(models, firsts, strict=True)}
    draw_strips(strips, sheet, ", ".join(f"6 {kind}" for kind in sorted(set(chosen["kind"]))))
    means = [table.groupby("kind").mean() for table in tables]
    table = pd.concat(means, axis=1, keys=list(models)).round(3)
    table.insert(0, ("", "captions"), listed.groupby("kind").size())
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("method", choices=["ablated", "filtered"])
    parser.add_argument("--norm", type=float, help="filtered: longest guidance vector that is learnt")
    parser.add_argument("--steps", type=int, default=STEPS, help="default: %(default)s")
    parser.add_argument("--work", type=Path, default=HERE / "work", help="logs and models (default: %(default)s)")
    args = parser.parse_args()
    listed = read_prompts(LISTS["eps"])
    listed["kind"] = np.where(listed["label"] == 1, "memorized", listed["kind"])
    pictures = [image for image in listed["image"] if image]
    chosen = [listed[listed["kind"] == "memorized"].iloc[::3], listed[listed["kind"] == "ordinary"].iloc[::8]]
    if args.method == "ablated":
        names = ["ablated"]
        ablate(args.work, args.steps)
    else:
        names = ["plain", "filtered"]
        captions = data.make_captions(usable_table(), SEED)
        new = new_pictures(captions, args.work / "new")
        train_filtered(args.work, args.steps, args.norm, new, captions)
        chosen, pictures = [new, *chosen], pictures + new["image"].tolist()
    models = {"testbed-eps": START, **{name: args.work / name / "model" for name in names}}
    sheet = args.work / args.method / "sheet.png"
    table = compare(models, pd.concat(chosen), pictures, sheet)
    table.to_csv(args.work / args.method / "replication.csv")
    print(f"{table.to_string()}\n{sheet}")


if __name__ == "__main__":
    main()
