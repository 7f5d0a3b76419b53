"""More cross-attention for the start token, none for the padding.

Ren, Li, Zeng, Xu, Lyu, Xing, Tang, "Unveiling and Mitigating Memorization in Text-to-image Diffusion Models through
Cross Attention", ECCV 2024: the logit of the start token is multiplied by C (1.1 to 1.5), padding tokens are masked, in
every cross-attention layer of the conditional half, at every step.

Deviation: a negative logit times C > 1 would lose attention; it is divided by C, so that the start token always gains.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor

from memorization.mitigations.base import MITIGATIONS, Mitigation
from memorization.mitigations.case import Case, Remedy
from memorization.models.attention import end_of_text
from memorization.settings import Bounds


class RescalingAttnProcessor(AttnProcessor):
    """diffusers' plain attention with other logits in the second half of the rows.

    Args:
        ends: place of the end-of-text token of every row of that half, ``(rows,)``; what follows it is masked.
        factor: C.
    """

    def __init__(self, ends: Tensor, factor: float) -> None:
        self.ends, self.factor = ends, factor

    def __call__(self, attn, *args, **kwargs) -> Tensor:
        def scores(query: Tensor, key: Tensor, mask: Tensor | None = None) -> Tensor:
            dtype = query.dtype
            if attn.upcast_attention:
                query, key = query.float(), key.float()
            logits = (attn.scale * query @ key.transpose(1, 2)).float().unflatten(0, (2, -1, attn.heads))
            cond = logits[1]  # (rows, heads, pixels, tokens)
            start = cond[..., 0]
            cond[..., 0] = torch.where(start > 0, start * self.factor, start / self.factor)
            padding = torch.arange(cond.shape[-1], device=cond.device) > self.ends[:, None]
            cond.masked_fill_(padding[:, None, None], -torch.inf)
            return logits.softmax(-1).flatten(0, 2).to(dtype)

        attn.get_attention_scores = scores
        try:
            return super().__call__(attn, *args, **kwargs)
        finally:
            del attn.get_attention_scores


@contextmanager
def rescaled(unet, ends: Tensor, factor: float) -> Iterator[None]:
    """While it lasts, every cross-attention layer of ``unet`` is a :class:`RescalingAttnProcessor`."""
    before = unet.attn_processors
    chosen = RescalingAttnProcessor(ends, factor)
    unet.set_attn_processor({name: chosen if ".attn2." in name else old for name, old in before.items()})
    try:
        yield
    finally:
        unet.set_attn_processor(before)


@MITIGATIONS.register
@dataclass(frozen=True)
class AttentionRescale(Mitigation):
    """``attention_rescale``. ``strength``: C, at least 1."""

    strength: Annotated[float, Bounds(1)] = 1.25

    name: ClassVar[str] = "attention_rescale"
    asks: ClassVar[tuple[str, ...]] = ("attention",)
    strengths: ClassVar[tuple[float, ...]] = (1.1, 1.25, 1.5, 2.0, 3.0)

    def __call__(self, case: Case) -> Remedy:
        ends = end_of_text(case.pipe, case.prompts).repeat_interleave(len(case.noise))
        return Remedy.unchanged(case, around=lambda rows: rescaled(case.pipe.unet, ends[rows], self.strength))
