"""Whether a picture copies what is fixed of a caption: the normalised l2 of that part.

AMG's nL2 (memorization/similarity) asks how much nearer a picture is to one training picture than to the k nearest of
all others. Here the others are fresh scenes of the same caption, since a picture may well have the right object and
pattern without being a copy; and the distance is taken over the part that is fixed:

- ``verbatim``: all pixels;
- ``object``: those that the fixed object covers, by its alpha;
- ``background``: the 60% that agree best, since an object somewhere covers up to 41%; all scenes are drawn without one.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from testbed.composed import scenes
from testbed.composed.scenes import NAMED, random_scenes

FRESH, K, ALPHA = 256, 50, 0.5
AGREE = 0.6


def fresh_scenes(row: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Scenes ``(count, fields)`` with the object, colour and pattern of ``row`` and all else at random."""
    rows = random_scenes(np.random.default_rng(seed), count)
    rows[:, : len(NAMED)] = row[: len(NAMED)]
    return rows


@torch.no_grad()
def part_distance(pictures: Tensor, others: Tensor, kind: str, alpha: Tensor) -> Tensor:
    """Root mean square difference ``(pictures, others)`` over the part that ``kind`` fixes; pictures in [-1, 1].

    Args:
        alpha: the fixed object's cover of each pixel, ``(h, w)``.
    """
    if kind == "background":
        rows = [(picture - others).square().mean(1).flatten(1) for picture in pictures]
        kept = int(AGREE * rows[0].shape[1])
        return torch.stack([row.topk(kept, largest=False, sorted=False).values.mean(1).sqrt() for row in rows])
    weight = alpha if kind == "object" else torch.ones_like(alpha)
    weight = (weight / (3 * weight.sum())).sqrt()
    return torch.cdist((pictures * weight).flatten(1), (others * weight).flatten(1))


@torch.no_grad()
def copy_distance(pictures: Tensor, row: np.ndarray, kind: str, seed: int = 11) -> Tensor:
    """nL2 ``(n,)`` of pictures ``(n, 3, h, w)`` in [-1, 1] to the fixed part of scene ``row``; about 2 by chance."""
    rows = np.concatenate([row[None], fresh_scenes(row, FRESH, seed)])
    others = scenes.draw(rows, pictures.device, objects=kind != "background").float() / 127.5 - 1
    distance = part_distance(pictures.float(), others, kind, scenes.object_alpha(row[None])[0].to(pictures.device))
    near = distance[:, 1:].topk(K, largest=False).values.mean(1)
    return distance[:, 0] / (ALPHA * near).clamp_min(1e-12)
