"""Noise predictions of given prompts on any latents: what detectors that ask the model again are given."""

from __future__ import annotations

import torch
from torch import Tensor

from local_sd_pipeline import LocalStableDiffusionPipeline


class Predictor:
    """eps as a function of the latents.

    Args:
        prompt_embeds: ``(rows, tokens, width)``: latents of row i are predicted under embedding i.
        empty: the empty prompt's embedding, ``(1, tokens, width)``.
        batch_size: latents to a UNet call.
    """

    def __init__(
        self, pipe: LocalStableDiffusionPipeline, prompt_embeds: Tensor, empty: Tensor, batch_size: int
    ) -> None:
        self.pipe, self.prompt_embeds, self.batch_size = pipe, prompt_embeds, batch_size
        self.empty = empty.expand_as(prompt_embeds)

    def __call__(self, latents: Tensor, timestep: int, cond: bool = True) -> Tensor:
        """eps of ``latents (rows, points, c, h, w)`` under the prompts, or under the empty prompt; float32."""
        points = latents.shape[1]
        embeds = (self.prompt_embeds if cond else self.empty).repeat_interleave(points, 0)
        chunks = zip(latents.flatten(0, 1).split(self.batch_size), embeds.split(self.batch_size), strict=True)
        return torch.cat([self.pipe.predict_noise(x, timestep, e) for x, e in chunks]).unflatten(0, (-1, points))

    def noise_scales(self, timestep: int) -> tuple[float, float]:
        """(alpha, sigma) = (sqrt(abar_t), sqrt(1 - abar_t))."""
        return self.pipe.noise_scales(timestep)
