"""Flux.1: a transformer of a rectified flow on packed latents, time given as s.

Flux-dev is distilled from a guided model: it is given a guidance scale and has no unconditional branch. What stands for
no prompt here is the empty prompt ("true guidance" in diffusers), at the pipeline's own embedded scale. The other
difference that such a model has, between two embedded scales, is the detector ``two_guidances``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from memorization.models.families.base import FAMILIES, Arguments, PooledFlow


@FAMILIES.register
class Flux(PooledFlow):
    """``flux``."""

    name: ClassVar[str] = "flux"
    pipelines: ClassVar[tuple[str, ...]] = ("FluxPipeline",)
    arguments: ClassVar[tuple[str, ...]] = ("hidden_states",)
    unguided: ClassVar[Mapping[str, Any]] = {}
    watchable: ClassVar[bool] = False

    def encode_empty(self, pipe: Any) -> list[Tensor]:
        return list(pipe.encode_prompt("", None)[:2])

    def guidance_scale(self, pipe: Any) -> float:
        """1: the pipeline's own default is for dev's denoiser, which is given it; schnell has no use for any."""
        return 1.0

    def contrast(self, pipe: Any) -> str:
        return "true guidance with the empty prompt; no unconditional branch was trained"

    def pack(self, latents: Tensor) -> Tensor:
        """Squares of 2 x 2 pixels become channels, and the squares one axis."""
        squares = latents.unflatten(3, (-1, 2)).unflatten(2, (-1, 2))  # (rows, c, h/2, 2, w/2, 2)
        return squares.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)

    def unpack(self, pipe: Any, packed: Tensor, call: Arguments) -> Tensor:
        height, width = (int(side) + 1 for side in call["img_ids"][:, 1:].amax(0))  # in squares
        squares = packed.unflatten(2, (-1, 2, 2)).unflatten(1, (height, width))  # (rows, h/2, w/2, c, 2, 2)
        return squares.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)
