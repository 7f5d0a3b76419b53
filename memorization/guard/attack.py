"""An attack on the guard: an embedding that draws a training picture while the score stays below the threshold.

Optimised like those that bring back what a mitigation took away (DoRI, ICML 2026: the denoising loss of the training
picture, by Adam on the embedding), with a penalty where the pull at the attacker's own noise reaches the threshold. The
attacker knows the weights, the threshold and the noise: the worst case for the guard.
"""

from __future__ import annotations

import torch
from torch import Tensor

from local_sd_pipeline import LocalStableDiffusionPipeline
from memorization.models.families.base import discrete_scale
from optim_utils import all_but_the_start_token, descend

TIMESTEPS = (900, 700, 500, 300, 100)  # of the denoising loss
PENALTY = 100.0  # of a pull above the bound, squared
BELOW = 0.95  # of the threshold, which the attacker stays under


def attack(
    pipe: LocalStableDiffusionPipeline,
    embeds: Tensor,
    picture: Tensor,
    noise: Tensor,
    threshold: float,
    timestep: float,
    *,
    iterations: int,
    generator: torch.Generator,
) -> Tensor:
    """The embedding ``(1, tokens, width)`` that an attacker finds.

    Args:
        embeds: the memorized prompt's, to start from.
        picture: latents of its training picture, ``(1, c, h, w)``.
        noise: x_T, ``(1, c, h, w)``.
        threshold: of the guard.
        timestep: of the first step, whose score the guard reads.
        generator: of the noise of the denoising loss, on the CPU.
    """
    empty = pipe.embed([""]).float()
    start, scale = noise.float(), discrete_scale(pipe.scheduler, timestep)
    with torch.no_grad():
        uncond = pipe.predict_noise(start, round(timestep), empty)
    added = [torch.randn(picture.shape, generator=generator).to(picture) for _ in TIMESTEPS]

    def loss(moving: Tensor, rows: Tensor) -> Tensor:
        total = torch.zeros(len(moving), device=moving.device)
        for t, eps in zip(TIMESTEPS, added, strict=True):
            alpha, sigma = pipe.noise_scales(t)
            found = pipe.predict_noise(alpha * picture + sigma * eps, t, moving)
            total = total + (found - eps).square().mean() / len(TIMESTEPS)
        difference = pipe.predict_noise(start, round(timestep), moving) - uncond
        pull = difference.flatten(1).norm(dim=1) / difference[0].numel() ** 0.5 * scale.sigma / scale.alpha
        return total + PENALTY * (pull / (BELOW * threshold) - 1).clamp_min(0).square()

    with torch.enable_grad():
        found = descend(loss, embeds.float(), lr=0.01, iterations=iterations, free=all_but_the_start_token(embeds))
    return found.best
