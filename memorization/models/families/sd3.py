"""Stable Diffusion 3 and 3.5: a transformer that predicts the velocity of a rectified flow, time given as 1000 s."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from local_sd_pipeline import Scale
from memorization.models.families.base import FAMILIES, Arguments, Family


@FAMILIES.register
class StableDiffusion3(Family):
    """``sd3``."""

    name: ClassVar[str] = "sd3"
    pipelines: ClassVar[tuple[str, ...]] = ("StableDiffusion3Pipeline",)
    part: ClassVar[str] = "transformer"
    arguments: ClassVar[tuple[str, ...]] = ("hidden_states", "encoder_hidden_states", "pooled_projections", "timestep")
    embeddings: ClassVar[tuple[str, ...]] = ("prompt_embeds", "pooled_prompt_embeds")
    latents: ClassVar[str] = "hidden_states"

    def scale(self, pipe: Any, timestep: float) -> Scale:
        sigma = timestep / pipe.scheduler.config.num_train_timesteps
        return Scale("flow", 1 - sigma, sigma)

    def condition(self, named: Arguments) -> list[Tensor]:
        return [named["encoder_hidden_states"], named["pooled_projections"]]

    def conditioned(self, named: Arguments, condition: list[Tensor]) -> dict[str, Any]:
        return {**named, "encoder_hidden_states": condition[0], "pooled_projections": condition[1]}

    def encode_empty(self, pipe: Any) -> list[Tensor]:
        embeds, _, pooled, _ = pipe.encode_prompt("", "", "", do_classifier_free_guidance=False)
        return [embeds, pooled]
