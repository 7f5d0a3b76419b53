"""Pictures as a pipeline gives them: compared with an index of training pictures, and replaced by blank ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from memorization.errors import InputError
from memorization.guard.verdict import Near
from memorization.index.kinds import SIZED
from memorization.index.store import Index
from memorization.io.pictures import to_bytes, to_tensor
from memorization.similarity.judge import FIELD_LIMITS, is_copy
from memorization.similarity.nl2 import NEIGHBOURS, normalized

Pictures = Any  # of a pipeline: a list of PIL pictures, an array (n, h, w, 3) in [0, 1], or a tensor (n, 3, h, w)


@dataclass(frozen=True)
class Comparison:
    """Which training picture is nearest, and whether it counts as copied.

    Args:
        limit: of the measure; None for the field's own.

    Raises:
        InputError: the measure has no limit of the field, or nL2 lacks the 50 neighbours that it needs.
    """

    index: Index
    limit: float | None = None

    def __post_init__(self) -> None:
        if self.measure == "nl2" and len(self.index) < NEIGHBOURS:
            raise InputError(
                f"{self.index.folder}: nL2 needs {NEIGHBOURS} training pictures, here are {len(self.index)}"
            )
        if self.limit is None and self.measure not in FIELD_LIMITS:
            raise InputError(f"{self.index.folder}: says nearness by {self.measure}, for which a limit has to be given")

    @property
    def measure(self) -> str:
        """``nl2`` of an index of pixels, ``l2`` of one of latents; else the cosine of its features."""
        return {"pixels": "nl2", "latents": "l2"}.get(self.index.kind, self.index.kind)

    def __call__(self, pictures: np.ndarray) -> list[Near]:
        """Of every picture, uint8 ``(n, h, w, 3)``."""
        distance, rows = self.index.search(self.index.describe(to_tensor(pictures)), NEIGHBOURS)
        if self.measure == "nl2":
            distance = normalized(distance, distance)
        values = distance[:, 0] if self.index.kind in SIZED else 1 - distance[:, 0]
        limit = FIELD_LIMITS[self.measure][0] if self.limit is None else self.limit
        # of latents the distance is no "nl2" but lower is nearer all the same
        copied = is_copy("nl2" if self.index.kind in SIZED else self.measure, values.numpy(), limit)
        return [
            Near(self.measure, round(value, 4), limit, self.index.paths[row], bool(is_near))
            for value, row, is_near in zip(values.tolist(), rows[:, 0].tolist(), copied, strict=True)
        ]


def is_pictures(made: Pictures) -> bool:
    """Whether these are pictures; latents are none."""
    if isinstance(made, Tensor):
        return made.dim() == 4 and made.shape[1] == 3
    return isinstance(made, (list, np.ndarray)) and len(made) > 0


def as_bytes(made: Pictures) -> np.ndarray:
    """uint8 ``(n, h, w, 3)``."""
    if isinstance(made, Tensor):
        return to_bytes(made.float() * 2 - 1)
    if isinstance(made, np.ndarray):
        return (made * 255).round().astype(np.uint8)
    return np.stack([np.asarray(picture.convert("RGB")) for picture in made])


def blanked(made: Pictures, reasons: dict[int, str]) -> Pictures:
    """The same with blank pictures, on which the reason is written, at the rows of ``reasons``."""
    found = list(made) if isinstance(made, list) else made.clone() if isinstance(made, Tensor) else made.copy()
    pictures = as_bytes(made)
    for row, reason in reasons.items():
        blank = blank_picture(pictures.shape[1:3], reason)
        if isinstance(found, list):
            found[row] = blank
        elif isinstance(found, Tensor):
            found[row] = torch.from_numpy(np.array(blank)).permute(2, 0, 1).to(found) / 255
        else:
            found[row] = np.asarray(blank) / 255
    return found


def blank_picture(size: Sequence[int], reason: str) -> Image.Image:
    """White, of ``size`` (height, width), with ``reason`` written from the top left, as far as it goes."""
    height, width = size
    picture = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(picture)
    lines = [""]
    for word in reason.split():
        longer = f"{lines[-1]} {word}".strip()
        fits = draw.textlength(longer) <= width - 4
        lines[-1:] = [longer] if fits or not lines[-1] else [lines[-1], word]
    draw.multiline_text((2, 2), "\n".join(lines), fill="black")
    return picture
