"""A second look: the guidance vector where one guided step of the prompt leads, not on pure noise. Ours.

The anisotropy score of Asthana and Belagiannis (ICLR 2026) reads low noise levels on pure noise, which no model has
seen there. Here x_T is denoised by one guided step, noised again to a lower level t, and read there:

    x0_hat = (x_T - sigma_T (eps_u + g d)) / alpha_T,   d = eps_c - eps_u at the first step of the grid
    y = alpha_t x0_hat + sigma_t z,                     z one fixed noise, the same for every prompt and x_T
    a || d(y, t) ||_2 + b cos( d(y, t), eps_u(y, t) )

Four evaluations a prompt and noise: both predictions at x_T, of which the unconditional one is shared by a whole run,
and both at y. The sign of the angle is a property of the model, so b is 0 until it is fitted (detect_eval.py
--calibrate).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor

from memorization.detectors.base import DETECTORS, GradientDetector
from memorization.detectors.features import features
from memorization.settings import NotNegative, Seed, Timestep

if TYPE_CHECKING:
    from local_sd_pipeline import NoisePrediction
    from memorization.models.predictor import Predictor


def second_noise(shape: Sequence[int], seed: int) -> Tensor:
    """z, ``shape``, from a stream that no run's seed gives: it must not be one of the x_T."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(2**63 + seed))


@DETECTORS.register
@dataclass(frozen=True)
class SecondLook(GradientDetector):
    """``second_look`` with its terms ``second_norm`` and ``second_cosine``: each ``(prompts, noises)``.

    Args:
        norm_weight, cosine_weight: a and b.
        timestep: t, of the second look.
        guidance: g, of the step that leads there.
        cosine: ``pixel``: over the channels of each latent pixel, then averaged; ``vector``: over the whole latent.
        seed: of z.
    """

    norm_weight: float = 1.0
    cosine_weight: float = 0.0
    timestep: Timestep = 201
    guidance: NotNegative = 3.0
    cosine: Literal["pixel", "vector"] = "vector"
    seed: Seed = 0

    name: ClassVar[str] = "second_look"
    steps: ClassVar[tuple[int, ...]] = (0,)
    terms: ClassVar[tuple[str, ...]] = ("second_look", "second_norm", "second_cosine")
    weights: ClassVar[dict[str, str]] = {"norm_weight": "second_norm", "cosine_weight": "second_cosine"}
    takes_differences: ClassVar[bool] = False

    def __call__(self, trace: list[NoisePrediction], predict: Predictor) -> dict[str, Tensor]:
        (first,) = trace
        alpha, sigma = predict.noise_scales(self.timestep)
        clean = first.scale.x0(first.uncond + self.guidance * first.guidance, first.latents)
        z = second_noise(first.latents.shape[1:], self.seed).to(clean.device)
        latents = alpha * clean + sigma * z
        uncond, cond = (predict.raw(latents, self.timestep, cond=half) for half in (False, True))
        kind = first.prediction_type
        found = features(type(first)(self.timestep, latents, uncond, cond, alpha, sigma, kind))
        norm, cosine = found["norm"], found[f"cos_{self.cosine}"]
        score = self.norm_weight * norm + self.cosine_weight * cosine
        return {"second_look": score, "second_norm": norm, "second_cosine": cosine}
