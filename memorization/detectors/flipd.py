"""Local intrinsic dimension (FLIPD) at a picture: low where the density is concentrated, as on a memorized one.

Kamkari et al. 2024 (FLIPD); Ross et al., "A Geometric Framework for Understanding Memorization in Generative Models",
ICLR 2025. At x = alpha x_0, the picture's scaled latents without noise, with the score s(x) = -eps / sigma,

    FLIPD = d + sigma^2 (tr J_s + |s|^2) = d - sigma tr J_eps + |eps|^2,   tr J = E[v . J v], v of random signs

The detector's value is -FLIPD of the conditional density, so that higher means memorized; a picture without a prompt
has that of the empty prompt.

Deviation: the trace is the mean over ``probes`` central differences, one direction v each, the same for every picture.
For generated pictures x_0 is the end of the generation, not decoded and encoded again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from memorization.detectors.base import DETECTORS, ImageDetector
from memorization.models.probes import random_signs
from memorization.settings import Count, Positive, Seed, Timestep

if TYPE_CHECKING:
    from memorization.models.predictor import Predictor


@DETECTORS.register
@dataclass(frozen=True)
class Flipd(ImageDetector):
    """``flipd`` (minus FLIPD, in latent dimensions): values ``(rows,)``, higher means memorized.

    Args:
        timestep: the noise level at which the density is looked at.
        probes: directions of the trace estimate, two evaluations each.
        step: of the differences, in units of one latent entry.
        seed: of the directions.
    """

    timestep: Timestep = 50  # not tuned: to be chosen on a validation half
    probes: Count = 2
    step: Positive = 1e-2
    seed: Seed = 0

    name: ClassVar[str] = "flipd"
    terms: ClassVar[tuple[str, ...]] = ("flipd",)
    takes_differences: ClassVar[bool] = True

    def __call__(self, clean: Tensor, predict: Predictor) -> dict[str, Tensor]:
        """From clean latents ``(rows, c, h, w)``."""
        alpha, sigma = predict.noise_scales(self.timestep)
        generator = torch.Generator().manual_seed(self.seed)
        signs = random_signs((self.probes, *clean.shape[1:]), generator).to(clean.device)
        centre = alpha * clean[:, None]
        eps = predict(centre, self.timestep)
        ahead, behind = (predict(centre + s * self.step * signs, self.timestep) for s in (1, -1))
        trace = ((ahead - behind) * signs).flatten(2).sum(2).mean(1) / (2 * self.step)
        return {"flipd": sigma * trace - clean[0].numel() - eps.flatten(1).square().sum(1)}
