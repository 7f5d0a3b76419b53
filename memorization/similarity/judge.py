"""Everything that is measured of generated pictures, in one place for the scripts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from local_sd_pipeline import LocalStableDiffusionPipeline
from memorization.io.pictures import read_picture, to_tensor
from memorization.similarity.clip import Clip
from memorization.similarity.nl2 import NEIGHBOURS, normalized_l2
from memorization.similarity.sscd import SSCD, find_weights


class Judge:
    """Measures pictures of a prompt against the prompt and against its training picture.

    Args:
        training: file of each known training picture; normalised l2 takes its 50 neighbours from all of them, and is
            left out where there are fewer.
        size: (height, width) of generated pictures.
        clip: for text alignment; left out where it cannot be had.
        sscd: the same for copy detection.
    """

    def __init__(
        self, training: Sequence[Path], size: tuple[int, int], clip: Clip | None = None, sscd: SSCD | None = None
    ) -> None:
        self.clip, self.sscd = clip, sscd
        self.description = {
            "clip": clip and clip.name,
            "sscd": sscd and sscd.name,
            "training": len(set(training)),
        }
        self.place = {path: i for i, path in enumerate(dict.fromkeys(training))}
        pictures = np.stack([read_picture(path, size) for path in self.place]) if self.place else None
        self.training = torch.from_numpy(pictures).permute(0, 3, 1, 2) if pictures is not None else None
        self.embedded = sscd(pictures) if sscd and pictures is not None else None

    def __call__(self, pictures: np.ndarray, prompt: str, image: Path | None) -> dict[str, list[float]]:
        """A value a picture under each name: ``clip``; ``nl2`` (lower is nearer) and ``sscd`` where ``image`` is known.

        Args:
            pictures: uint8 ``(n, h, w, 3)``.
            prompt: what was asked for, before any change.
            image: its training picture.
        """
        values = {}
        if self.clip:
            values["clip"] = (self.clip.pictures(pictures) @ self.clip.prompts([prompt])[0]).tolist()
        if image is not None:
            place = self.place[image]
            if self.training is not None and len(self.place) >= NEIGHBOURS:
                values["nl2"] = normalized_l2(to_tensor(pictures), self.training, NEIGHBOURS)[:, place].tolist()
            if self.sscd and self.embedded is not None:
                values["sscd"] = (self.sscd(pictures) @ self.embedded[place]).tolist()
        return {name: [round(value, 4) for value in column] for name, column in values.items()}


def make_judge(
    pipe: LocalStableDiffusionPipeline, training: Sequence[Path], clip: str | None, sscd: str = "official-288"
) -> Judge:
    """A judge of a pipeline's pictures, with SSCD where its weights are there.

    Args:
        clip: folder or hub id; None or ``none`` for no text alignment.
        sscd: preset.
    """
    side = pipe.unet.config.sample_size
    height, width = (side, side) if isinstance(side, int) else side
    size = (height * pipe.vae_scale_factor, width * pipe.vae_scale_factor)
    scorer = Clip(clip, pipe.device) if clip and clip != "none" else None
    return Judge(training, size, scorer, SSCD(sscd) if find_weights() else None)
