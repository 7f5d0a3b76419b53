"""Scalar features of one noise prediction, for studies of what separates where and for learned detectors."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

if TYPE_CHECKING:
    from local_sd_pipeline import NoisePrediction


def features(point: NoisePrediction) -> dict[str, Tensor]:
    """Feature name -> values, with the leading axes of ``point.cond``; each higher where prompts pull harder.

    - ``norm``: |d| (of a flow D, :meth:`Scale.pull`); ``norm_cond``: |eps_c|
    - ``cos_pixel``, ``cos_vector``: cos(eps_u, d), at each pixel over channels and averaged, and over the whole latent
    - ``turn``: 1 - cos(eps_c, eps_u)
    - ``cos_noise``: cos(x, d)

    Angles are between noises; at the first step of a flow these say nothing.
    """
    uncond, cond = point.eps
    d = cond - uncond
    uncond, x = torch.broadcast_to(uncond, cond.shape), torch.broadcast_to(point.latents, cond.shape)

    def cosine(a: Tensor, b: Tensor) -> Tensor:
        return cosine_similarity(a.flatten(-3), b.flatten(-3), dim=-1)

    return {
        "norm": point.norm,
        "norm_cond": cond.flatten(-3).norm(dim=-1),
        "cos_pixel": cosine_similarity(uncond, d, dim=-3).mean((-1, -2)),
        "cos_vector": cosine(uncond, d),
        "turn": 1 - cosine(cond, uncond),
        "cos_noise": cosine(x, d),
    }


FEATURES = ("norm", "norm_cond", "cos_pixel", "cos_vector", "turn", "cos_noise")
