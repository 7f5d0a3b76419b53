"""A mitigation of the tool on single pictures of a user's generation."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from local_sd_pipeline import LocalStableDiffusionPipeline, NoisePrediction
from memorization.detectors.base import DETECTORS, OneStepDetector, PromptDetector
from memorization.errors import InputError
from memorization.guard.call import Call
from memorization.mitigations.base import Levels, Mitigation
from memorization.mitigations.case import Case, Remedy
from memorization.models.generation import Guide

ROW = torch.tensor([0])  # a case here is one prompt on one noise


@dataclass
class Applied:
    """A remedy of one picture, while it is drawn.

    Attributes:
        asks: whether the denoiser has to be asked again, under another embedding or context.
    """

    remedy: Remedy
    guide: Guide | None
    asks: bool
    kind: str

    def output(self, call: Call, row: int, output: Tensor, index: int) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """(the output of a picture's rows under the remedy, and what they predict without and with the prompt).

        Args:
            output: of the whole call.
            index: of the step.
        """
        own = call.of([row], condition=[self.remedy.embeds] if self.asks else None)
        found = output[call.places([row])]
        if self.asks:
            with self.remedy.around(ROW) if self.remedy.around else nullcontext():
                found = own.output()
        uncond, cond = pair = own.pair(found)
        if self.guide is None:
            return found, pair
        x, scale = own.latents.float(), own.scale
        predicted = NoisePrediction(
            int(_time(own)), x, scale.eps(uncond, x), scale.eps(cond, x), scale.alpha, scale.sigma, self.kind
        )
        followed = scale.output(self.guide(index, predicted), x)
        # Both halves say the same, so that whatever the pipeline's guidance makes of them is what the guide said.
        return followed.repeat(len(found), 1, 1, 1), pair


def _time(call: Call) -> float:
    return float(torch.as_tensor(call.named["timestep"]).flatten()[0])


def check_mitigation(mitigation: Mitigation, levels: Levels) -> None:
    """See that it can be applied, before a picture is drawn.

    Raises:
        InputError: the score to reach is not known.
    """
    if mitigation.needs_level:
        mitigation.bound(levels)


def apply(
    mitigation: Mitigation,
    pipe: Any,
    noise: Tensor,
    embeds: Tensor,
    prompt: str | None,
    levels: Levels,
    guidance_scale: float,
    steps: int,
) -> Applied:
    """The remedy of one picture.

    Args:
        noise: x_T of unit variance, ``(1, c, h, w)``.
        embeds: ``(1, tokens, width)``.
        prompt: its text, for methods that change words; None where only an embedding is known.

    Raises:
        InputError: the method needs words or a score that are not there, or its descent met NaN.
    """
    with torch.no_grad():
        local = LocalStableDiffusionPipeline(**pipe.components, requires_safety_checker=False)
    local.set_progress_bar_config(disable=True)
    case = Case(
        pipe=local, prompts=[prompt or ""], embeds=embeds.float(), noise=noise.float(),
        detectors=_detectors(mitigation), levels=levels, steps=steps, guidance_scale=guidance_scale, batch_size=8,
    )  # fmt: skip
    try:
        with torch.enable_grad():  # pipelines draw without
            remedy = mitigation(case)
    except FloatingPointError as error:
        raise InputError(f"{mitigation.name}: {error}; try float32") from None
    if prompt is None and (remedy.prompts != case.prompts or remedy.around):
        raise InputError(f"{mitigation.name}: needs the prompt's text, the pipeline was given an embedding")
    asks = remedy.around is not None or not torch.equal(remedy.embeds, case.embeds)
    asks = asks or not torch.equal(remedy.latents[0], case.noise)
    return Applied(remedy, remedy.guide(ROW) if remedy.guide else None, asks, pipe.scheduler.config.prediction_type)


def _detectors(mitigation: Mitigation) -> dict[str, OneStepDetector]:
    made = DETECTORS.make(mitigation.lowers) if mitigation.lowers else None
    return {made.name: made} if isinstance(made, PromptDetector) else {}
