"""Mitigation by training, on testbed-eps: ``python -m testbed.finetune filtered`` and ``... ablated``.

- ``filtered`` trains anew by the recipe of testbed-eps, but leaves out visits whose guidance vector is long (Wen et
  al., ICLR 2024, section 5.2): what is being memorized is not learnt further.
- ``ablated`` goes on from testbed-eps: under a memorized caption the UNet learns to predict what the frozen model
  predicts under the ordinary caption nearest to it by text (Kumari et al., "Ablating Concepts in Text-to-Image
  Diffusion Models", ICCV 2023), on noisy pictures that the frozen model made of that neighbour.

Afterwards the share of copies is measured by duplication weight, before and after. Training is resumable; the models
stay under ``--work``.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
from torch import Tensor
from torch.nn.functional import mse_loss, normalize
from tqdm import tqdm

from local_sd_pipeline import LocalStableDiffusionPipeline
from memorization.models import ROOT, ModelSpec, find_model, load_pipeline
from memorization.prompts import read_prompts
from memorization.similarity.clip import Clip
from memorization.similarity.judge import Judge
from memorization.trajectory import generate as generate_latents
from testbed.fit import fit
from testbed.train import HERE, MODELS, UNET_BATCH, UNET_STEPS, digest, save_pipeline, seeded, train_unet
from testbed.verify import CAPTIONS_AT_ONCE, GUIDANCE, LISTS, generate

ABLATION_STEPS = 400


def load(folder: Path | str, **options) -> LocalStableDiffusionPipeline:
    """A testbed model in float32."""
    return load_pipeline(ModelSpec(str(folder), (str(folder),)), "float32", torch.device("cpu"), **options)


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


def ablate(work: Path, steps: int) -> Path:
    """Fine-tune memorized captions towards their neighbours; the folder of the new model."""
    frozen, pipe = load(MODELS / "testbed-eps"), load(MODELS / "testbed-eps")
    neighbour = nearest_ordinary(frozen, read_prompts(LISTS["eps"]))
    memorized, anchors = list(neighbour), sorted(set(neighbour.values()))
    made = anchor_latents(frozen, anchors)
    with torch.no_grad():
        embedded = dict(zip([*memorized, *anchors], frozen.embed([*memorized, *anchors]), strict=True))
    pipe.unet.requires_grad_(True)

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

    fit(
        pipe.unet,
        loss_of,
        steps=steps,
        peak=1e-4,
        folder=work / "ablated",
        recipe=f"ablated, {steps} steps, from {digest(MODELS / 'testbed-eps' / 'unet')}",
    )
    scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    save_pipeline(pipe.unet, pipe.text_encoder, pipe.tokenizer, scheduler, work / "ablated" / "model")
    return work / "ablated" / "model"


def replication(folder: Path, listed: pd.DataFrame) -> pd.DataFrame:
    """Per caption: share of copies among 8 pictures (fixed scenes), text alignment, weight and kind."""
    spec = find_model("testbed-eps")
    pipe = load(folder, images=True)
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    judge = Judge([ROOT / image for image in listed["image"] if image], (64, 64), Clip(spec.clip))
    found = []
    for start in tqdm(range(0, len(listed), CAPTIONS_AT_ONCE), desc=f"verify {folder.parent.name}/{folder.name}"):
        batch = listed.iloc[start : start + CAPTIONS_AT_ONCE]
        for row, pictures in zip(batch.itertuples(), generate(pipe, batch["prompt"].tolist()), strict=True):
            values = judge(pictures, row.prompt, ROOT / row.image if row.image else None)
            copies = np.mean(np.array(values["nl2"]) < spec.copy_limits["nl2"]) if row.image else np.nan
            found.append(
                {"kind": row.kind, "weight": row.duplicates, "copies": copies, "clip": np.mean(values["clip"])}
            )
    return pd.DataFrame(found)


def compare(before: pd.DataFrame, after: pd.DataFrame) -> pd.DataFrame:
    """Means by kind and weight."""
    grouped = [frame.groupby(["kind", "weight"])[["copies", "clip"]].mean() for frame in (before, after)]
    return pd.concat(grouped, axis=1, keys=["testbed-eps", "after"]).round(3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("method", choices=["filtered", "ablated"])
    parser.add_argument(
        "--norm", type=float, default=2.0, help="filtered: longest guidance vector that is still learnt"
    )
    parser.add_argument("--steps", type=int, help="default: as testbed-eps, and 400 for ablated")
    parser.add_argument("--work", type=Path, default=HERE / "work", help="logs and models (default: testbed/work)")
    args = parser.parse_args()
    folder = args.work / args.method / "model"
    if args.method == "ablated":
        ablate(args.work, args.steps or ABLATION_STEPS)
    else:
        steps = args.steps or UNET_STEPS["eps"]
        train_unet("epsilon", None, args.work, steps, stage="filtered", out=folder, skip_above=args.norm)
    listed = read_prompts(LISTS["eps"])
    chosen = pd.concat([listed[listed["kind"] == "duplicated"], listed[listed["kind"] == "ordinary"].iloc[::8]])
    table = compare(replication(MODELS / "testbed-eps", chosen), replication(folder, chosen))
    table.to_csv(args.work / args.method / "replication.csv")
    print(table.to_string())


if __name__ == "__main__":
    main()
