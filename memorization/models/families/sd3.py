"""Stable Diffusion 3 and 3.5: a transformer that predicts the velocity of a rectified flow, time given as 1000 s."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from memorization.models.families.base import FAMILIES, PooledFlow


@FAMILIES.register
class StableDiffusion3(PooledFlow):
    """``sd3``."""

    name: ClassVar[str] = "sd3"
    pipelines: ClassVar[tuple[str, ...]] = ("StableDiffusion3Pipeline",)
    arguments: ClassVar[tuple[str, ...]] = ("hidden_states", "encoder_hidden_states", "pooled_projections", "timestep")

    def encode_empty(self, pipe: Any) -> list[Tensor]:
        embeds, _, pooled, _ = pipe.encode_prompt("", "", "", do_classifier_free_guidance=False)
        return [embeds, pooled]
