"""Pictures of prompts, and maps of where each is copied."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from memorization.evaluation.metrics import noise_mean
from memorization.io.figures import overlay
from memorization.io.files import replacing, writing
from memorization.io.pictures import save_picture
from memorization.localisation.base import Map
from memorization.models.attention import end_of_text
from memorization.models.base import TextToImage, check_able
from memorization.models.decoding import decode
from memorization.models.finite import check_finite
from memorization.models.generation import generate
from memorization.models.loading import Model
from memorization.models.predictor import Predictor
from memorization.runs.detect import Scoring
from memorization.runs.memory import default_batch_size
from memorization.runs.scorer import check_precision


class Located(NamedTuple):
    """Of a prompt: pictures, uint8 ``(noises, H, W, 3)``, and by name the maps, float32 ``(noises, h, w)``."""

    pictures: np.ndarray
    maps: dict[str, np.ndarray]


class Locator:
    """Makes pictures and their maps.

    Args:
        noises: a prompt; the first so many of the seed's.
        steps: of a generation.
        batch_size: rows to a UNet call.

    Raises:
        InputError: a map does not go with the model or its precision.
    """

    def __init__(
        self,
        pipe: TextToImage,
        maps: Sequence[Map],
        *,
        noises: int,
        seed: int,
        steps: int,
        guidance_scale: float,
        batch_size: int,
    ) -> None:
        check_able(pipe, maps)
        check_precision(pipe, maps)
        self.pipe, self.maps, self.steps, self.guidance_scale = pipe, maps, steps, guidance_scale
        self.latents, self.batch_size = pipe.pure_noise(noises, seed), batch_size
        self.recorded = [steps - 1] if any(one.needs_attention for one in maps) else []

    @torch.no_grad()
    def __call__(self, prompt: str) -> Located:
        """Those of a prompt.

        Raises:
            InputError: a picture or a map is not finite; names the prompt.
        """
        embeds, empty, ends = self.pipe.embed([prompt]), self.pipe.embed([""]), self._ends(prompt)
        pictures, maps = [], {one.name: [] for one in self.maps}
        for latents in self.latents.split(max(1, self.batch_size // 2)):
            count, names = len(latents), [prompt] * len(latents)
            rows = embeds.repeat_interleave(count, 0)
            *_, last = generate(
                self.pipe, rows, empty, latents, steps=self.steps, guidance_scale=self.guidance_scale,
                ends=None if ends is None else ends.expand(count), attention_steps=self.recorded, names=names,
            )  # fmt: skip
            predict = Predictor(self.pipe, rows, empty, self.batch_size)
            for one in self.maps:
                found = one(last, predict).float()
                check_finite(found, one.name, names)
                maps[one.name].append(found.cpu().numpy())
            pictures += decode(self.pipe, last.after, names)
        return Located(np.stack(pictures), {name: np.concatenate(parts) for name, parts in maps.items()})

    def _ends(self, prompt: str) -> Tensor | None:
        """Place of the end-of-text token, where attention is recorded."""
        return end_of_text(self.pipe, [prompt]) if self.recorded else None


def save_located(located: Located, number: int, folder: Path) -> None:
    """``<number>-<noise>.png``, an overlay ``<number>-<noise>-<map>.png`` a map, and ``<number>.npz`` with the maps."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    for noise, picture in enumerate(located.pictures):
        save_picture(picture, folder / f"{number:04d}-{noise}.png")
        for name, values in located.maps.items():
            save_picture(overlay(picture, values[noise]), folder / f"{number:04d}-{noise}-{name}.png")
    with replacing(folder / f"{number:04d}.npz") as part, part.open("wb") as file:
        np.savez(file, **located.maps)  # ty: ignore[invalid-argument-type]


def localise(
    model: Model, rows: list[dict], by: str, maps: Sequence[Map], scoring: Scoring, threshold: float | None, out: Path
) -> int:
    """Heat maps of the flagged prompts into ``out``, or of the ten highest where there is no threshold; how many.

    Args:
        rows: lines of a run.
        by: the score that ranks and flags them.
    """
    ranked = sorted(((noise_mean(row[by]), row["id"], row["prompt"]) for row in rows), key=lambda found: -found[0])
    chosen = ranked[:10] if threshold is None else [found for found in ranked if found[0] >= threshold]
    scale = model.spec.scale if scoring.guidance_scale is None else scoring.guidance_scale
    locate = Locator(
        model.pipe, maps, noises=scoring.noises, seed=scoring.seed, steps=scoring.steps, guidance_scale=scale,
        batch_size=scoring.batch_size or default_batch_size(model.pipe),
    )  # fmt: skip
    for _, number, prompt in tqdm(chosen, "localise"):
        save_located(locate(prompt), number, out)
    return len(chosen)
