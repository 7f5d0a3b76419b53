"""Stable Diffusion XL: a UNet of eps or v under two text encoders, a pooled embedding and the picture's size."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from local_sd_pipeline import Scale
from memorization.models.families.base import FAMILIES, Arguments, Family, discrete_scale


@FAMILIES.register
class StableDiffusionXL(Family):
    """``sdxl``. No prompt is zeros where the pipeline is set so, not the empty text."""

    name: ClassVar[str] = "sdxl"
    pipelines: ClassVar[tuple[str, ...]] = ("StableDiffusionXLPipeline",)
    part: ClassVar[str] = "unet"
    arguments: ClassVar[tuple[str, ...]] = ("sample", "timestep", "encoder_hidden_states")
    embeddings: ClassVar[tuple[str, ...]] = ("prompt_embeds", "pooled_prompt_embeds")
    latents: ClassVar[str] = "sample"

    def scale(self, pipe: Any, timestep: float) -> Scale:
        return discrete_scale(pipe.scheduler, timestep)

    def condition(self, named: Arguments) -> list[Tensor]:
        return [named["encoder_hidden_states"], named["added_cond_kwargs"]["text_embeds"]]

    def conditioned(self, named: Arguments, condition: list[Tensor]) -> dict[str, Any]:
        added = {**named["added_cond_kwargs"], "text_embeds": condition[1]}
        return {**named, "encoder_hidden_states": condition[0], "added_cond_kwargs": added}

    def contrast(self, pipe: Any) -> str:
        return "zeros" if pipe.config.force_zeros_for_empty_prompt else super().contrast(pipe)

    def encode_empty(self, pipe: Any) -> list[Tensor]:
        embeds, _, pooled, _ = pipe.encode_prompt("", do_classifier_free_guidance=False)
        found = [embeds, pooled]
        return [torch.zeros_like(one) for one in found] if pipe.config.force_zeros_for_empty_prompt else found
