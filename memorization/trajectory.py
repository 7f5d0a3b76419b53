"""A guided generation, step by step: what every trajectory detector reads, generated once for all of them.

A row is a pair of prompt and noise. Rows do not depend on one another, so any number of them may go together.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import NamedTuple

import torch
from diffusers import DDIMScheduler
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor
from torch.nn.functional import interpolate

from local_sd_pipeline import LocalStableDiffusionPipeline, NoisePrediction


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


class Step(NamedTuple):
    """One step of a generation.

    Attributes:
        index: 0 for the noisiest.
        prediction: latents, uncond and cond are each ``(rows, c, h, w)``.
        x0: the clean latents that the guided noise prediction implies.
        after: the latents of the next step.
        attention: ``None`` where it was not asked for.
    """

    index: int
    prediction: NoisePrediction
    x0: Tensor
    after: Tensor
    attention: Attention | None


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


def end_of_text(pipe: LocalStableDiffusionPipeline, prompts: Sequence[str]) -> Tensor:
    """Place of the first end-of-text token of each prompt, ``(prompts,)``."""
    length = pipe.tokenizer.model_max_length
    tokens = pipe.tokenizer(list(prompts), padding="max_length", truncation=True, max_length=length).input_ids
    return torch.tensor([ids.index(pipe.tokenizer.eos_token_id) for ids in tokens], device=pipe.device)


def generate(
    pipe: LocalStableDiffusionPipeline,
    prompt_embeds: Tensor,
    empty: Tensor,
    latents: Tensor,
    *,
    steps: int = 50,
    guidance_scale: float = 7.5,
    guide: Callable[[int, NoisePrediction], Tensor] | None = None,
    ends: Tensor | None = None,
    attention_steps: Collection[int] = (),
) -> Iterator[Step]:
    """DDIM (eta 0) from pure noise, on the detectors' grid, with classifier-free guidance.

    Args:
        prompt_embeds: ``(rows, tokens, width)``.
        empty: the empty prompt's embedding, ``(1, tokens, width)``.
        latents: ``(rows, c, h, w)``, float32.
        guide: (step, prediction) -> the noise prediction to follow; classifier-free guidance where there is none.
        ends: from :func:`end_of_text`, a value a row; needed where attention is recorded.
        attention_steps: indices of the steps whose attention is recorded.
    """
    scheduler = DDIMScheduler.from_config(
        pipe.scheduler.config, timestep_spacing="leading", steps_offset=1, prediction_type="epsilon",
        clip_sample=False, thresholding=False,
    )  # fmt: skip
    scheduler.set_timesteps(steps)
    embeds = torch.cat([empty.expand_as(prompt_embeds), prompt_embeds])
    blank = (prompt_embeds == empty).flatten(1).all(1)[:, None, None, None]
    for index, t in enumerate(scheduler.timesteps.tolist()):
        recorder = AttentionRecorder(ends, tuple(latents.shape[-2:])) if index in attention_steps else None
        with recorder.installed(pipe.unet) if recorder else nullcontext():
            uncond, cond = pipe.predict_noise(latents.repeat(2, 1, 1, 1), t, embeds).chunk(2)
        cond = torch.where(blank, uncond, cond)  # as in the trace: the guidance vector of a blank prompt is 0
        prediction = NoisePrediction(
            t, latents, uncond, cond, *pipe.noise_scales(t), pipe.scheduler.config.prediction_type
        )
        followed = guide(index, prediction) if guide else uncond + guidance_scale * (cond - uncond)
        result = scheduler.step(followed, t, latents)
        attention = recorder.attention() if recorder else None
        yield Step(index, prediction, result.pred_original_sample, result.prev_sample, attention)
        latents = result.prev_sample
