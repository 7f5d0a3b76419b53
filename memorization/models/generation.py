"""A guided generation, step by step: what every trajectory detector reads, generated once for all of them.

A row is a pair of prompt and noise. Rows do not depend on one another, so any number of them may go together.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from diffusers import DDIMScheduler
from torch import Tensor

from local_sd_pipeline import LocalStableDiffusionPipeline, NoisePrediction
from memorization.models.attention import Attention, AttentionRecorder

Guide = Callable[[int, NoisePrediction], Tensor]  # (step, prediction) -> the noise prediction that the sampler follows


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


def generate(
    pipe: LocalStableDiffusionPipeline,
    prompt_embeds: Tensor,
    empty: Tensor,
    latents: Tensor,
    *,
    steps: int = 50,
    guidance_scale: float = 7.5,
    guide: Guide | None = None,
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
        recorder = None
        if ends is not None and index in attention_steps:
            recorder = AttentionRecorder(ends, (latents.shape[-2], latents.shape[-1]))
        with recorder.installed(pipe.unet) if recorder else nullcontext():
            uncond, cond = pipe.predict_noise(latents.repeat(2, 1, 1, 1), t, embeds).chunk(2)
        cond = torch.where(blank, uncond, cond)  # as in the trace: the guidance vector of a blank prompt is 0
        prediction = NoisePrediction(
            t, latents, uncond, cond, *pipe.noise_scales(t), pipe.scheduler.config.prediction_type
        )
        followed = guide(index, prediction) if guide else uncond + guidance_scale * (cond - uncond)
        result: Any = scheduler.step(followed, t, latents)
        attention = recorder.attention() if recorder else None
        yield Step(index, prediction, result.pred_original_sample, result.prev_sample, attention)
        latents = result.prev_sample
