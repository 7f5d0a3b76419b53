"""A training folder and the epochs of an adapter on the tiny pipeline, whose copies are known."""

import json

import torch
from conftest import GOLDEN, load_tiny
from PIL import Image
from safetensors.torch import save_file

from memorization.audit.tries import seed_of
from memorization.io.pictures import save_picture
from memorization.mitigations.case import Remedy
from memorization.models.lora import wearing
from memorization.runs.cases import Cases
from memorization.runs.sampling import sample

TINY = str(GOLDEN / "tiny-eps")
CAPTIONS = ["zwx, a kite over a harbour", "zwx, two boats", "zwx, an old clock", "zwx, a red tree at dusk"]
STEPS, SEED, SCALE = 4, 51, 3.0
COPIED = (0, 1)  # places of the pictures that the last epoch gives back
FLAGS = ["--base", TINY, "--device", "cpu", "--dtype", "float32", "--steps", str(STEPS), "--guidance-scale", str(SCALE),
         "--noises", "2", "--measure", "nl2"]  # fmt: skip


def layers(pipe, strength: float, rank: int = 4) -> dict:
    """Tensors of an adapter on the text's keys and values, with random numbers."""
    generator, found = torch.Generator().manual_seed(7), {}
    for name, module in pipe.unet.named_modules():
        if name.endswith(("attn2.to_k", "attn2.to_v")):
            out, into = module.weight.shape
            found[f"unet.{name}.lora_A.weight"] = torch.randn(rank, into, generator=generator)
            found[f"unet.{name}.lora_B.weight"] = strength * torch.randn(out, rank, generator=generator)
    return found


def save_epochs(folder) -> list:
    """Three files as kohya names them: no change, hardly any, and the last, which copies."""
    folder.mkdir(parents=True, exist_ok=True)
    pipe = load_tiny("tiny-eps")
    names = {"mine-000001": 0.0, "mine-000002": 1e-4, "mine": 1.0}
    for name, strength in names.items():
        save_file(layers(pipe, strength), folder / f"{name}.safetensors")
    return [folder / f"{name}.safetensors" for name in names]


def save_training(folder, adapter) -> None:
    """Pictures with .txt beside them: of COPIED what the adapter draws of the captions, others noise."""
    folder.mkdir(parents=True, exist_ok=True)
    pipe = load_tiny("tiny-eps", pictures=True)
    generator = torch.Generator().manual_seed(3)
    for place, caption in enumerate(CAPTIONS):
        (folder / f"{place}.txt").write_text(caption)
        noise = torch.randn(8, 8, 3, generator=generator).mul(40).add(128).clamp(0, 255).byte().numpy()
        Image.fromarray(noise).resize((32, 32)).save(folder / f"{place}.png")
    with wearing(pipe, adapter), torch.no_grad():
        for place in COPIED:
            noise = pipe.pure_noise(2, seed_of(SEED, CAPTIONS[place], 1))[None]
            case = Cases(pipe, noise[0], STEPS, SCALE, SEED, 8)([CAPTIONS[place]])
            save_picture(sample(case, Remedy.unchanged(case, latents=noise))[0, 0], folder / f"{place}.png")


def numbers(out) -> dict:
    """What an audit found."""
    return json.loads((out / "audit.json").read_text())
