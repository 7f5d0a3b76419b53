"""A guided generation, step by step: what every trajectory detector reads, generated once for all of them.

A row is a pair of prompt and noise. Rows do not depend on one another, so any number of them may go together.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from diffusers import DDIMScheduler
from torch import Tensor

from local_sd_pipeline import NoisePrediction
from memorization.errors import InputError
from memorization.models.attention import Attention, AttentionRecorder
from memorization.models.base import TextToImage
from memorization.models.finite import check_finite

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


def detection_grid(pipe: TextToImage, steps: int) -> list[int]:
    """The timesteps of the grid that detectors and generations share, noisiest first.

    Raises:
        InputError: the checkpoint was trained on too few timesteps for so many.
    """
    trained = pipe.scheduler.config.num_train_timesteps
    if pipe.prediction_type == "flow":
        return pipe.detection_timesteps(steps)
    if trained // steps * (steps - 1) + 1 >= trained or steps > trained:  # of "leading" spacing, offset 1
        raise InputError(f"--steps {steps}: the checkpoint was trained on {trained} timesteps, too few for such a grid")
    return pipe.detection_timesteps(steps)


def generate(
    pipe: TextToImage,
    prompt_embeds: Tensor,
    empty: Tensor,
    latents: Tensor,
    *,
    steps: int = 50,
    guidance_scale: float = 7.5,
    guide: Guide | None = None,
    ends: Tensor | None = None,
    attention_steps: Collection[int] = (),
    names: Sequence[str] = (),
) -> Iterator[Step]:
    """DDIM (eta 0), and Euler of a flow, from pure noise, on the detectors' grid, with classifier-free guidance.

    Args:
        prompt_embeds: ``(rows, ...)``.
        empty: the empty prompt's embedding, ``(1, ...)``.
        latents: ``(rows, c, h, w)``, float32.
        guide: (step, prediction) -> the prediction to follow, in its unit; classifier-free guidance where
            there is none.
        ends: from :func:`end_of_text`, a value a row; needed where attention is recorded.
        attention_steps: indices of the steps whose attention is recorded.
        names: of the rows, for a message.

    Raises:
        InputError: the clean latents are not finite; names the row. Or the checkpoint knows too few timesteps.
    """
    grid = detection_grid(pipe, steps)
    step = _flow_step(pipe, grid) if pipe.prediction_type == "flow" else _ddim_step(pipe, grid)
    embeds = torch.cat([empty.expand_as(prompt_embeds), prompt_embeds])
    blank = (prompt_embeds == empty).flatten(1).all(1)[:, None, None, None]
    for index, t in enumerate(grid):
        recorder = None
        if ends is not None and index in attention_steps:
            recorder = AttentionRecorder(ends, (latents.shape[-2], latents.shape[-1]))
        with recorder.installed(pipe.denoiser) if recorder else nullcontext():
            uncond, cond = pipe.predict_noise(latents.repeat(2, 1, 1, 1), t, embeds).chunk(2)
        cond = torch.where(blank, uncond, cond)  # as in the trace: the guidance vector of a blank prompt is 0
        prediction = NoisePrediction(t, latents, uncond, cond, *pipe.noise_scales(t), pipe.prediction_type)
        followed = guide(index, prediction) if guide else uncond + guidance_scale * (cond - uncond)
        x0, after = step(index, followed, latents)
        attention = recorder.attention() if recorder else None
        yield Step(index, prediction, x0, after, attention)
        latents = after
    check_finite(latents, "the generated picture", names)


Sampler = Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]]  # (index, prediction, latents) -> (x0, next latents)


def _ddim_step(pipe: TextToImage, grid: Sequence[int]) -> Sampler:
    scheduler = DDIMScheduler.from_config(
        pipe.scheduler.config, timestep_spacing="leading", steps_offset=1, prediction_type="epsilon",
        clip_sample=False, thresholding=False,
    )  # fmt: skip
    scheduler.set_timesteps(len(grid))

    def step(index: int, eps: Tensor, latents: Tensor) -> tuple[Tensor, Tensor]:
        result: Any = scheduler.step(eps, grid[index], latents)
        return result.pred_original_sample, result.prev_sample

    return step


def _flow_step(pipe: TextToImage, grid: Sequence[float]) -> Sampler:
    """x' = x + (s' - s) v: DDIM's step, written for alpha = 1 - s."""
    sigmas = [*(pipe.noise_scales(t)[1] for t in grid), 0.0]

    def step(index: int, velocity: Tensor, latents: Tensor) -> tuple[Tensor, Tensor]:
        sigma, after = sigmas[index], sigmas[index + 1]
        return latents - sigma * velocity, latents + (after - sigma) * velocity

    return step
