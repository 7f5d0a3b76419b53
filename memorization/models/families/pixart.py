"""PixArt-alpha and -Sigma: a transformer of eps and a variance, under T5 with a mask."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from local_sd_pipeline import Scale
from memorization.models.families.base import FAMILIES, Arguments, Family, discrete_scale


@FAMILIES.register
class PixArt(Family):
    """``pixart``. The channels of the variance are dropped. Prompts are lower-cased, but not cleaned any further."""

    name: ClassVar[str] = "pixart"
    pipelines: ClassVar[tuple[str, ...]] = ("PixArtAlphaPipeline", "PixArtSigmaPipeline")
    part: ClassVar[str] = "transformer"
    arguments: ClassVar[tuple[str, ...]] = ("hidden_states", "encoder_hidden_states", "timestep")
    latents: ClassVar[str] = "hidden_states"
    embeddings: ClassVar[tuple[str, ...]] = ("prompt_embeds", "prompt_attention_mask")
    # Cleaning takes packages that may be there or not; a model's own size is its own bin.
    unguided: ClassVar[Mapping[str, Any]] = {
        "guidance_scale": 1.0, "clean_caption": False, "use_resolution_binning": False
    }  # fmt: skip
    watchable: ClassVar[bool] = False

    def scale(self, pipe: Any, timestep: float) -> Scale:
        return discrete_scale(pipe.scheduler, timestep)

    def condition(self, named: Arguments) -> list[Tensor]:
        return [named["encoder_hidden_states"], named["encoder_attention_mask"]]

    def conditioned(self, named: Arguments, condition: list[Tensor]) -> dict[str, Any]:
        return {**named, "encoder_hidden_states": condition[0], "encoder_attention_mask": condition[1]}

    def encode_empty(self, pipe: Any) -> list[Tensor]:
        return list(pipe.encode_prompt("", do_classifier_free_guidance=False)[:2])

    def prediction(self, output: Tensor, latents: Tensor) -> Tensor:
        return output[:, : latents.shape[1]]
