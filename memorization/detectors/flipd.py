"""Local intrinsic dimension (FLIPD): low where the density is concentrated, as on a memorized picture.

Kamkari et al. 2024 (FLIPD); Ross et al., "A Geometric Framework for Understanding Memorization in Generative Models",
ICLR 2025. With the score s(x) = -eps / sigma at latents x = alpha x_0 + sigma noise,

    FLIPD = d + sigma^2 (tr J_s + |s|^2) = d - sigma tr J_eps + |eps|^2,   tr J = E[v . J v], v of random signs

The detector's value is -FLIPD of the conditional density, so that higher means memorized.

Deviation: taken on pure noise at t = 981, as all one-step detectors here, not on a noised image; the trace is the mean
over ``probes`` central differences, one direction v each, the same for every prompt.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from memorization.detectors.base import DETECTORS, GradientDetector
from memorization.settings import Count, Positive, Seed

if TYPE_CHECKING:
    from local_sd_pipeline import NoisePrediction
    from memorization.models.predictor import Predictor


@DETECTORS.register
@dataclass(frozen=True)
class Flipd(GradientDetector):
    """``flipd`` (minus FLIPD, in latent dimensions): values ``(prompts, noises)``, higher means memorized.

    Args:
        probes: directions of the trace estimate.
        step: of the differences, in units of one latent entry.
        seed: of the directions.
    """

    probes: Count = 2
    step: Positive = 1e-2
    seed: Seed = 0

    name: ClassVar[str] = "flipd"
    steps: ClassVar[tuple[int, ...]] = (0,)
    terms: ClassVar[tuple[str, ...]] = ("flipd",)

    def __call__(self, trace: list[NoisePrediction], predict: Predictor) -> dict[str, Tensor]:
        (first,) = trace
        generator = torch.Generator().manual_seed(self.seed)
        latents = first.latents.expand_as(first.cond)
        shape = first.latents.shape[1:]  # one direction for all noises
        trace_of = 0
        for _ in range(self.probes):
            sign = (torch.randint(2, shape, generator=generator) * 2.0 - 1).to(latents.device)
            ahead, behind = (predict(latents + s * self.step * sign, first.timestep) for s in (1, -1))
            trace_of = trace_of + ((ahead - behind) * sign).flatten(2).sum(2) / (2 * self.step * self.probes)
        dimension = latents[0, 0].numel()
        flipd = dimension - first.sigma * trace_of + first.cond.flatten(2).square().sum(2)
        return {"flipd": -flipd}
