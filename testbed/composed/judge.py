"""What a picture shows, by the testbed's own CLIP: the object, colour and pattern whose captions are nearest to it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from memorization.similarity.clip import Clip
from testbed.composed.captions import FORMS, compose, titles
from testbed.composed.scenes import NAMED, random_scenes

CAPTIONS_A_CLASS = 64
SIZES = (40, 10, 10)  # objects, colours, patterns


class Judge:
    """Zero-shot classifier: a class is the mean of the embeddings of captions that name it."""

    def __init__(self, clip: Path, device: torch.device | str = "cpu") -> None:
        self.clip = Clip(str(clip), device)
        self.device = torch.device(device)
        self.classes = [self._embed(place, size).to(self.device) for place, size in enumerate(SIZES)]

    def _embed(self, place: int, size: int) -> Tensor:
        rng = np.random.default_rng([place, size])
        count = size * CAPTIONS_A_CLASS
        named = random_scenes(rng, count)[:, : len(NAMED)]
        named[:, place] = np.repeat(np.arange(size), CAPTIONS_A_CLASS)
        prompts = compose(named, titles(rng, count), rng.integers(len(FORMS), size=count), np.ones(count, bool))
        return normalize(self.clip.prompts(prompts).unflatten(0, (size, -1)).mean(1), dim=1)

    @torch.no_grad()
    def __call__(self, pictures: Tensor) -> Tensor:
        """Object, colour and pattern ``(n, 3)`` of pictures ``(n, 3, h, w)`` in [-1, 1]."""
        parts = []
        for chunk in pictures.split(256):
            features = self.clip.describe(chunk.float().to(self.device))
            parts.append(torch.stack([(features @ c.T).argmax(1) for c in self.classes], dim=1))
        return torch.cat(parts).cpu()

    def accuracy(self, pictures: Tensor, named: np.ndarray, coloured: np.ndarray | None = None) -> dict[str, float]:
        """Share of pictures that show what ``named (n, 3)`` says; as for colour, of the ``coloured (n,)``."""
        right = (self(pictures) == torch.as_tensor(named, dtype=torch.long)).double()
        if coloured is not None:
            right[~torch.as_tensor(np.asarray(coloured)), NAMED.index("colour")] = torch.nan
        return {name: round(value, 4) for name, value in zip(NAMED, right.nanmean(0).tolist(), strict=True)}
