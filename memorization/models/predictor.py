"""Predictions of given prompts on any latents: what detectors that ask the model again are given."""

from __future__ import annotations

import torch
from torch import Tensor

from memorization.models.base import TextToImage, unit_of


class Predictor:
    """The model as a function of the latents: eps when it is called, and :meth:`raw` as it is traced.

    Args:
        prompt_embeds: ``(rows, ...)``: latents of row i are predicted under embedding i.
        empty: the empty prompt's embedding, ``(1, ...)``.
        batch_size: latents to a call of the denoiser.
    """

    def __init__(self, pipe: TextToImage, prompt_embeds: Tensor, empty: Tensor, batch_size: int) -> None:
        self.pipe, self.prompt_embeds, self.batch_size = pipe, prompt_embeds, batch_size
        self.empty = empty.expand_as(prompt_embeds)

    def __call__(self, latents: Tensor, timestep: int, cond: bool = True) -> Tensor:
        """eps of ``latents (rows, points, c, h, w)`` under the prompts, or under the empty prompt; float32.

        The score of the density is -eps / sigma. At the first step of a flow it does not depend on the prompt.
        """
        return unit_of(self.pipe, timestep).eps(self.raw(latents, timestep, cond), latents)

    def raw(self, latents: Tensor, timestep: int, cond: bool = True, **options: float) -> Tensor:
        """What the model predicts in the unit of the trace: eps, or a flow's velocity.

        Args:
            options: ``guidance``, an embedded scale, for models that take one.
        """
        points = latents.shape[1]
        embeds = (self.prompt_embeds if cond else self.empty).repeat_interleave(points, 0)
        chunks = zip(latents.flatten(0, 1).split(self.batch_size), embeds.split(self.batch_size), strict=True)
        return torch.cat([self.pipe.predict_noise(x, timestep, e, **options) for x, e in chunks]).unflatten(
            0, (-1, points)
        )

    def noise_scales(self, timestep: int) -> tuple[float, float]:
        """(alpha, sigma) of x_t = alpha x0 + sigma eps."""
        return self.pipe.noise_scales(timestep)
