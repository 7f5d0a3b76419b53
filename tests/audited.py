"""A training folder and the epochs of an adapter on the tiny pipeline, whose copies are known."""

import json
import shutil
from unittest.mock import patch

import numpy as np
import torch
from conftest import GOLDEN, load_tiny
from PIL import Image
from safetensors.torch import save_file

from memorization import cli
from memorization.audit import engine
from memorization.audit.engine import BASE
from memorization.audit.findings import findings
from memorization.audit.measures.nl2 import ByNl2
from memorization.audit.run import Asked, write
from memorization.audit.training import Training
from memorization.audit.tries import seed_of
from memorization.io.pictures import save_picture
from memorization.mitigations.case import Remedy
from memorization.models.lora import wearing
from memorization.runs.cases import Cases
from memorization.runs.sampling import sample

TINY = str(GOLDEN / "tiny-eps")
CAPTIONS = ["zwx, a kite over a harbour", "zwx, two boats", "zwx, an old clock", "zwx, a red tree at dusk"]
STEPS, SEED, SCALE = 3, 51, 3.0
KILLED = 24  # the picture that a killed audit was about to write: the sixth of the second epoch
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
    names = {"mine-000001": 0.0, "mine-000002": 1e-6, "mine": 1.0}
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


def save_audit(place):
    """Epochs, training pictures and their audit; a copy of its folder as a process leaves it that is killed then."""
    epochs, saved = save_epochs(place / "lora"), []
    save_training(place / "set", epochs[-1])

    def save(*arguments):
        saved.append(arguments)
        if len(saved) == KILLED:
            shutil.copytree(place / "out", place / "killed")
        save_picture(*arguments)

    with patch.object(engine, "save_picture", save):
        cli.dispatch(["audit", *FLAGS, "--adapter", str(place / "lora"), "--training", str(place / "set"),
                      "--out", str(place / "out")])  # fmt: skip
    return place


class Given(ByNl2):
    """Distances that are given."""

    def __init__(self, apart):
        self._apart = np.array(apart)

    def apart(self):
        return self._apart


def save_run(folder, base, epochs, apart=None) -> dict:
    """A whole run of an audit, of given distances instead of pictures; gives back what was found.

    Args:
        base: the base's distances, ``(captions, noises)``.
        epochs: name -> those of an epoch; each picture is nearest to its own caption's training picture.
        apart: the training pictures' distances; None for far from one another.
    """
    captions = [f"caption {i}" for i in range(len(base))]
    files = [folder / "set" / f"{i}.png" for i in range(len(base))]
    blank = np.zeros((len(base), 8, 8, 3), np.uint8)
    training = Training([file.name for file in files], files, captions, blank, np.arange(len(base)))
    rows = []
    for name, values in {BASE: base, **epochs}.items():
        for i, own in enumerate(np.round(values, 4).tolist()):
            rows.append({
                "id": len(rows), "epoch": name, "prompt": captions[i], "kind": "caption", "training": files[i].name,
                "nl2": own, "nl2_nearest": [i] * len(own), "difference": [0.0] * len(own), "shown": int(np.argmin(own)),
            })  # fmt: skip
    (folder / "pictures").mkdir(parents=True)
    (folder / "scores.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    record = {
        "status": "complete", "seconds": 1.0, "lines": len(rows),
        "settings": {"model": "base", "tries": [[caption, "caption"] for caption in captions], "training": "sha256:0"},
        "epochs": [{"name": name, "revision": f"sha256:{i}"} for i, name in enumerate(epochs)],
        "training": [{"name": file.name, "file": str(file), "sha256": f"{i:064d}"} for i, file in enumerate(files)],
    }  # fmt: skip
    (folder / "run.json").write_text(json.dumps(record))
    apart = np.full((len(base), len(base)), 1e9) if apart is None else apart
    found = findings(rows, training, [Given(apart)], "difference", Asked().rate)
    write(found, folder)
    return found


def numbers(out) -> dict:
    """What an audit found."""
    return json.loads((out / "audit.json").read_text())
