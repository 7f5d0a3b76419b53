"""Stable Diffusion 1 and 2: a UNet of eps, v or x0 under one text encoder."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from local_sd_pipeline import Scale
from memorization.models.families.base import FAMILIES, Arguments, Family, discrete_scale


@FAMILIES.register
class StableDiffusion(Family):
    """``stable_diffusion``."""

    name: ClassVar[str] = "stable_diffusion"
    pipelines: ClassVar[tuple[str, ...]] = ("StableDiffusionPipeline",)
    part: ClassVar[str] = "unet"
    arguments: ClassVar[tuple[str, ...]] = ("sample", "timestep", "encoder_hidden_states")
    latents: ClassVar[str] = "sample"
    mitigable: ClassVar[bool] = True

    def scale(self, pipe: Any, timestep: float) -> Scale:
        return discrete_scale(pipe.scheduler, timestep)

    def condition(self, named: Arguments) -> list[Tensor]:
        return [named["encoder_hidden_states"]]

    def conditioned(self, named: Arguments, condition: list[Tensor]) -> dict[str, Any]:
        return {**named, "encoder_hidden_states": condition[0]}

    def encode_empty(self, pipe: Any) -> list[Tensor]:
        return [pipe.encode_prompt("", pipe._execution_device, 1, False)[0]]
