"""The cross-attention of a UNet call, recorded while it is computed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor
from torch.nn.functional import interpolate

from memorization.models.base import TextToImage


class Attention(NamedTuple):
    """Cross-attention of the conditional half of one UNet call, float32, reduced as it is computed.

    Attributes:
        tokens: how much each token gets, mean over heads and pixels, ``(layers, rows, tokens)``.
        end: map of the end-of-text token, mean over heads and layers at the latents' size, ``(rows, h, w)``.
        ends: place of the end-of-text token, ``(rows,)``.
    """

    tokens: Tensor
    end: Tensor
    ends: Tensor


class RecordingAttnProcessor(AttnProcessor):
    """diffusers' plain attention, whose probabilities ``(rows * heads, pixels, tokens)`` go to ``sink`` too."""

    def __init__(self, sink) -> None:
        self.sink = sink

    def __call__(self, attn, *args, **kwargs) -> Tensor:
        get_scores = attn.get_attention_scores

        def recording(*scores_args) -> Tensor:
            probabilities = get_scores(*scores_args)
            self.sink(probabilities.unflatten(0, (-1, attn.heads)))
            return probabilities

        attn.get_attention_scores = recording
        try:
            return super().__call__(attn, *args, **kwargs)
        finally:
            del attn.get_attention_scores


class AttentionRecorder:
    """Collects the cross-attention of one UNet call whose second half is conditional.

    Args:
        ends: place of the end-of-text token of every row, ``(rows,)``.
        size: (height, width) of the latents.
    """

    def __init__(self, ends: Tensor, size: tuple[int, int]) -> None:
        self.ends, self.size = ends, size
        self.tokens: list[Tensor] = []
        self.maps: list[Tensor] = []

    def sink(self, probabilities: Tensor) -> None:
        """One layer: ``(2 * rows, heads, pixels, tokens)``."""
        cond = probabilities.float().mean(1).chunk(2)[1]
        self.tokens.append(cond.mean(1))
        end = cond[torch.arange(len(cond)), :, self.ends]
        scale = (self.size[0] * self.size[1] / end.shape[1]) ** 0.5
        small = end.unflatten(1, (round(self.size[0] / scale), -1))[:, None]
        self.maps.append(interpolate(small, self.size, mode="bilinear")[:, 0])

    def attention(self) -> Attention:
        """What was collected."""
        return Attention(torch.stack(self.tokens), torch.stack(self.maps).mean(0), self.ends)

    @contextmanager
    def installed(self, unet) -> Iterator[None]:
        """While it lasts, every cross-attention layer of ``unet`` reports here."""
        before = unet.attn_processors
        recording = {name: RecordingAttnProcessor(self.sink) for name in before if ".attn2." in name}
        unet.set_attn_processor({**before, **recording})
        try:
            yield
        finally:
            unet.set_attn_processor(before)


def end_of_text(pipe: TextToImage, prompts: Sequence[str]) -> Tensor:
    """Place of the first end-of-text token of each prompt, ``(prompts,)``."""
    length = pipe.tokenizer.model_max_length
    tokens = pipe.tokenizer(list(prompts), padding="max_length", truncation=True, max_length=length).input_ids
    return torch.tensor([ids.index(pipe.tokenizer.eos_token_id) for ids in tokens], device=pipe.device)
