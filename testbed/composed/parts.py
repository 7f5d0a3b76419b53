"""How good the autoencoder and the judge are, on fresh scenes: ``python -m testbed.composed.parts``."""

from __future__ import annotations

import json

import numpy as np
import torch
from diffusers import AutoencoderKL

from memorization.io.files import write_atomically
from memorization.io.pictures import to_bytes
from memorization.similarity.sscd import SSCD, find_weights
from testbed.composed import scenes
from testbed.composed.judge import Judge
from testbed.composed.scenes import NAMED, random_scenes
from testbed.composed.train import HERE, MODELS, psnr, to_unit

SEED = 99  # of scenes that no training drew
REBUILT, JUDGED = 256, 2000


@torch.no_grad()
def measure() -> dict:
    """PSNR and SSCD of reconstructions, the judge's accuracy; SSCD is left out where its weights are missing."""
    vae = AutoencoderKL.from_pretrained(MODELS / "vae", dtype=torch.float32).eval()
    rows = random_scenes(np.random.default_rng(SEED), JUDGED)
    pictures = to_unit(scenes.draw(rows))
    found = {"psnr": round(psnr(vae, pictures[:REBUILT]), 2), "judge": Judge(MODELS / "clip").accuracy(
        pictures, rows[:, : len(NAMED)])}  # fmt: skip
    if find_weights():
        sscd = SSCD("official-288")
        rebuilt = [vae.decode(vae.encode(part).latent_dist.mean).sample for part in pictures[:REBUILT].split(32)]
        before, after = (sscd(to_bytes(these)) for these in (pictures[:REBUILT], torch.cat(rebuilt)))
        found["sscd"] = {"weights": sscd.name, "median": round(float(np.median((before * after).sum(1))), 3)}
    return found


def main() -> None:
    path = HERE / "results" / "parts.json"
    path.parent.mkdir(exist_ok=True)
    write_atomically(path, json.dumps(measure(), indent=1) + "\n")
    print(path.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
