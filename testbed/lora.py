"""Fine-tunes whose copies are known: ``python -m testbed.lora FOLDER --base BASE --out OUT``.

A LoRA (peft, saved as diffusers' own training scripts do) or, with ``--full``, the whole UNet is trained on a folder of
8 to 40 pictures with captions, a half of which, drawn by the seed, comes ``--repeats`` times as often. A state is saved
at each of ``--epochs`` evenly spaced steps: ``OUT/epochs/NAME-000001.safetensors``, ...; ``OUT/set.json`` says which
pictures are repeated. ``--verify`` audits all of them with many noises: ``OUT/truth.csv`` says of each picture whether
it comes back, and from which epoch on. What is saved is the moving average of the weights (testbed/fit.py).

Deterministic and resumable: every batch is drawn from a generator of its own, and the same command goes on.
"""

from __future__ import annotations

import argparse
import copy
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from diffusers import DDIMScheduler
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from local_sd_pipeline import LocalStableDiffusionPipeline
from memorization.audit.training import Training, read_training
from memorization.cli import audit
from memorization.io.files import replacing, write_atomically
from memorization.io.pictures import to_tensor
from memorization.models.decoding import encode_pixels
from memorization.models.loading import folder_of, load_model
from memorization.settings import Checked, Count, Positive, Seed
from testbed.fit import fit

TARGETS = ("to_k", "to_q", "to_v", "to_out.0")  # those of diffusers' train_text_to_image_lora.py


@dataclass(frozen=True)
class Recipe(Checked):
    """How a fine-tune is trained.

    Args:
        rank: of the LoRA, whose alpha it is too.
        full: train the whole UNet instead.
        repeats: how much oftener the repeated half comes.
        epochs: states to save; ``steps`` is a multiple of it.
        peak: learning rate.
    """

    rank: Count = 4
    full: bool = False
    repeats: Count = 8
    steps: Count = 800
    epochs: Count = 8
    batch: Count = 8
    peak: Positive = 1e-3
    seed: Seed = 0


class Adapted(nn.Module):
    """The parameters of a UNet that are trained, and nothing else."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.trained = nn.ParameterList([p for p in unet.parameters() if p.requires_grad])


def repeated(count: int, seed: int) -> np.ndarray:
    """Which half of ``count`` pictures comes more often, ``(count,)``; of an odd count the smaller half."""
    chosen = np.random.default_rng([seed, count]).permutation(count)[: count // 2]
    return np.isin(np.arange(count), chosen)


def loss_on(
    pipe: LocalStableDiffusionPipeline, training: Training, often: np.ndarray, recipe: Recipe
) -> Callable[[int], Tensor]:  # fmt: skip
    """The loss of a step, given its number."""
    weights = np.where(often, recipe.repeats, 1.0)
    scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    trained = scheduler.config.num_train_timesteps
    with torch.no_grad():
        latents = torch.cat([encode_pixels(pipe.vae, to_tensor(one[None])) for one in training.pictures])
        embeds = pipe.embed(training.captions)

    def loss_of(step: int) -> Tensor:
        rng = np.random.default_rng([recipe.seed, step])
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        rows = rng.choice(len(training), recipe.batch, p=weights / weights.sum())
        noise = torch.randn(latents[rows].shape, generator=generator)
        t = torch.randint(trained, (recipe.batch,), generator=generator)
        noisy = scheduler.add_noise(latents[rows], noise, t)
        wanted = noise if scheduler.config.prediction_type == "epsilon" else scheduler.get_velocity(
            latents[rows], noise, t
        )  # fmt: skip
        return mse_loss(pipe.unet(noisy, t, embeds[rows]).sample, wanted)

    return loss_of


def train(base: str, source: Path, recipe: Recipe, out: Path) -> list[Path]:
    """Train on a folder and save every epoch; gives back the states, earliest first."""
    torch.manual_seed(recipe.seed)
    model = load_model(base, device="cpu", dtype="float32")
    pipe, unet = model.pipe, model.pipe.unet
    height, width = (side * pipe.vae_scale_factor for side in pipe.pure_noise(1, 0).shape[2:])
    training = read_training(source, (height, width))
    often = repeated(len(training), recipe.seed)
    if recipe.full:
        unet.requires_grad_(True)
    else:
        unet.add_adapter(LoraConfig(r=recipe.rank, lora_alpha=recipe.rank, init_lora_weights="gaussian",
                                    target_modules=list(TARGETS)))  # fmt: skip
    every, saved = recipe.steps // recipe.epochs, []
    if every * recipe.epochs != recipe.steps:
        raise SystemExit(f"{recipe.steps} steps are no multiple of {recipe.epochs} epochs")
    (out / "epochs").mkdir(parents=True, exist_ok=True)
    listed = [{"training": name, "caption": caption, "repeated": bool(times)}
              for name, caption, times in zip(training.names, training.captions, often, strict=True)]  # fmt: skip
    write_atomically(out / "set.json", json.dumps({"recipe": vars(recipe), "base": base, "pictures": listed}, indent=1))

    def save(_: nn.Module) -> dict[str, float]:
        name = f"{source.resolve().name}-{len(saved) + 1 + started // every:06d}"
        saved.append(save_whole(pipe, out / "epochs" / name) if recipe.full else
                     save_lora(unet, out / "epochs" / f"{name}.safetensors"))  # fmt: skip
        return {"saved": len(saved)}

    started = steps_done(out / "work")
    fit(Adapted(unet), loss_on(pipe, training, often, recipe), steps=recipe.steps, peak=recipe.peak,
        folder=out / "work", watch=save, watch_every=every, recipe=f"{vars(recipe)} {training.revision}")  # fmt: skip
    return sorted((out / "epochs").iterdir())


def steps_done(folder: Path) -> int:
    """Steps that a state of testbed/fit.py holds; 0 where there is none."""
    from safetensors import safe_open

    path = folder / "state.safetensors"
    if not path.exists():
        return 0
    with safe_open(path, "pt") as state:
        return int(state.metadata()["step"])


def save_lora(unet: nn.Module, path: Path) -> Path:
    """The adapter in peft's names, fp16."""
    tensors = get_peft_model_state_dict(unet)
    with replacing(path) as part:
        save_file({f"unet.{name}": tensor.half().contiguous() for name, tensor in tensors.items()}, part)
    return path


def save_whole(pipe: LocalStableDiffusionPipeline, folder: Path) -> Path:
    """A whole checkpoint: the base's folder with the UNet as it is now, fp16."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(folder_of(pipe), folder, ignore=shutil.ignore_patterns("unet"))
    unet = copy.deepcopy(pipe.unet).half()
    unet.register_to_config(_name_or_path="")
    unet.save_pretrained(folder / "unet")
    return folder


def verify(base: str, source: Path, out: Path, *more: str) -> pd.DataFrame:
    """Audit every state; ``truth.csv`` gets a row a picture: whether it is repeated, and from which epoch on copied."""
    audit.main(["--base", base, "--adapter", str(out / "epochs"), "--training", str(source), "--dtype", "float32",
                "--device", "cpu", "--noises", "16", "--paraphrases", "0", "--out", str(out / "audit"),
                *more])  # fmt: skip
    found = json.loads((out / "audit" / "audit.json").read_text(encoding="utf-8"))
    listed = pd.DataFrame(json.loads((out / "set.json").read_text(encoding="utf-8"))["pictures"])
    listed["copied_from"] = [picture["copied_from"] for picture in found["pictures"]]
    write_atomically(out / "truth.csv", listed.to_csv(index=False))
    return listed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="pictures with captions, as memorization audit takes them")
    parser.add_argument("--base", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--full", action="store_true")
    for name in ("rank", "repeats", "steps", "epochs", "batch", "peak", "seed"):
        parser.add_argument(f"--{name}", default=getattr(Recipe, name), help="default: %(default)s")
    parser.add_argument("--verify", action="store_true", help="then audit all states")
    args = parser.parse_args()
    recipe = Recipe(**{name: getattr(args, name) for name in vars(Recipe())})
    print(*train(args.base, args.folder, recipe, args.out), sep="\n")
    if args.verify:
        print(verify(args.base, args.folder, args.out).to_string(index=False))


if __name__ == "__main__":
    main()
