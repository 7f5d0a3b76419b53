"""Score a list of prompts: one trace and one generation for all detectors, batched over prompts x noises."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from memorization.detectors.base import (
    Detector,
    GenerationDetector,
    GradientDetector,
    ImageDetector,
    PromptDetector,
)
from memorization.errors import InputError
from memorization.evaluation.bands import ROUNDS, Bands, noises_needed
from memorization.localisation.base import Map
from memorization.models.attention import end_of_text
from memorization.models.base import TextToImage, check_able
from memorization.models.finite import check_finite
from memorization.models.generation import detection_grid, generate
from memorization.models.predictor import Predictor


class Scorer:
    """Everything that does not depend on the prompts: noise, timesteps and the unconditional predictions.

    Args:
        noises: how many a prompt, the same for every prompt.
        first_noise: the first of them, in the sequence of the seed's noises.
        steps: of the DDIM grid, which places the timesteps of the trace and is the generation's.
        guidance_scale: of the generation.
        batch_size: rows (prompt-noise pairs) to a call of the denoiser.

    Attributes:
        generated: how many of the generation's steps are made: as many as the detectors read.
    """

    columns = ("prompt",)  # of a list, that it is called with

    def __init__(
        self,
        pipe: TextToImage,
        detectors: Sequence[Detector],
        *,
        noises: int,
        seed: int,
        steps: int,
        batch_size: int,
        guidance_scale: float = 7.5,
        first_noise: int = 0,
    ) -> None:
        self.pipe, self.batch_size, self.steps, self.guidance_scale = pipe, batch_size, steps, guidance_scale
        self.prompt = [detector for detector in detectors if isinstance(detector, PromptDetector)]
        self.gradient = [detector for detector in detectors if isinstance(detector, GradientDetector)]
        self.generation = [detector for detector in detectors if isinstance(detector, GenerationDetector)]
        self.image = [detector for detector in detectors if isinstance(detector, ImageDetector)]
        check_able(pipe, detectors)
        check_precision(pipe, detectors)
        if any(detector.forward_mode for detector in detectors):
            pipe.denoiser.to(memory_format=torch.contiguous_format)  # group norm has no forward derivative otherwise
        grid = detection_grid(pipe, steps)
        one_step = [*self.prompt, *self.gradient]
        for detector in one_step:
            if max(detector.steps) >= steps:
                raise InputError(f"{detector.name} reads step {max(detector.steps)} of the grid: give more --steps")
        trained = pipe.scheduler.config.num_train_timesteps
        if late := [detector for detector in detectors if getattr(detector, "timestep", 0) >= trained]:
            raise InputError(f"{late[0].name}: the checkpoint was trained on {trained} timesteps, counted from 0")
        self.timesteps = {place: grid[place] for detector in one_step for place in detector.steps}
        self.generated = steps if self.image else max((_steps_read(d, steps) for d in self.generation), default=0)
        self.latents = pipe.pure_noise(first_noise + noises, seed)[first_noise:]
        with torch.no_grad():  # not inference_mode: its tensors cannot take part in a Jacobian-vector product
            self.uncond = pipe.predict_uncond(self.latents, sorted(set(self.timesteps.values())), batch_size)

    @property
    def prompts_at_once(self) -> int:
        """Prompts to a batch: as many as fill a call of the denoiser."""
        return max(1, self.batch_size // len(self.latents))

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str]) -> list[dict[str, list]]:
        """Values a noise (or curves) of every detector and its terms, a dict a prompt.

        Raises:
            InputError: the model gave a value that is not finite; names the prompt.
        """
        embeds = self.pipe.embed(prompts)
        values = self._from_trace(embeds)
        if self.generation or self.image:
            values |= self._from_generation(prompts, embeds)
        return as_rows(values, prompts)

    def _from_trace(self, embeds: Tensor) -> dict[str, Tensor]:
        """Values ``(prompts, noises)`` of the detectors that read the trace."""
        trace = self.pipe.trace(embeds, self.latents, list(self.uncond.eps), self.uncond, self.batch_size)
        values = {}
        for detector in self.prompt:
            values |= detector([trace[self.timesteps[place]] for place in detector.steps])
        predict = Predictor(self.pipe, embeds, self.uncond.embedding, self.batch_size)
        for detector in self.gradient:
            values |= detector([trace[self.timesteps[place]] for place in detector.steps], predict)
        return values

    def _from_generation(self, prompts: Sequence[str], embeds: Tensor) -> dict[str, Tensor]:
        """Values ``(prompts, noises, ...)`` of the detectors that read a generation or its end.

        A row fills two places of a UNet call, so the prompt-noise pairs go in halves of the batch size.
        """
        noises = len(self.latents)
        recorded = {i for detector in self.generation for i in detector.attention_steps(self.steps)}
        ends = end_of_text(self.pipe, prompts) if recorded else None
        parts: dict[str, list[Tensor]] = {}
        for pairs in torch.arange(len(prompts) * noises, device=embeds.device).split(max(1, self.batch_size // 2)):
            owners = (pairs // noises).tolist()
            row_embeds, latents = embeds[pairs // noises], self.latents[pairs % noises]
            predict = Predictor(self.pipe, row_embeds, self.uncond.embedding, self.batch_size)
            kept = [[] for _ in self.generation]
            generation = generate(
                self.pipe, row_embeds, self.uncond.embedding, latents,
                steps=self.steps, guidance_scale=self.guidance_scale,
                ends=None if ends is None else ends[pairs // noises], attention_steps=recorded,
                names=[prompts[i] for i in owners],
            )  # fmt: skip
            for step in islice(generation, self.generated):
                for detector, of_steps in zip(self.generation, kept, strict=True):
                    of_steps.append(detector.reduce(step, predict))
            for detector, of_steps in zip(self.generation, kept, strict=True):
                _collect(parts, detector(torch.stack(of_steps)))
            for detector in self.image:
                _collect(parts, detector(step.after, predict))
        return {name: torch.cat(values).unflatten(0, (-1, noises)) for name, values in parts.items()}


def _steps_read(detector: GenerationDetector, steps: int) -> int:
    """How many of the first of ``steps`` steps its values need; all, where it names none."""
    read = detector.reads(steps)
    return max((read.get(name, steps) for name in (*detector.terms, *detector.curves)), default=steps)


def check_precision(pipe: TextToImage, methods: Sequence[Detector | Map]) -> None:
    """See that no method takes differences of a model in half precision.

    Raises:
        InputError: some do; names them.
    """
    if pipe.denoiser.dtype != torch.float32 and (names := [m.name for m in methods if m.takes_differences]):
        raise InputError(f"{', '.join(names)}: small differences drown in half precision; give --dtype float32")


def _collect(parts: dict[str, list[Tensor]], values: dict[str, Tensor]) -> None:
    for name, value in values.items():
        parts.setdefault(name, []).append(value)


class SequentialScorer:
    """A scorer that asks for more noises of the undecided prompts alone.

    Args:
        detector: the score that decides.
        bands: from :func:`fit_bands`.
        arguments: those of :class:`Scorer` but for the noises.
    """

    columns = ("prompt",)

    def __init__(self, *arguments, detector: str, bands: Bands, **settings) -> None:
        self.detector, self.bands = detector, bands
        self.scorers = [
            Scorer(*arguments, noises=n - before, first_noise=before, **settings)
            for before, n in zip((0, *ROUNDS[:-1]), ROUNDS, strict=True)
        ]

    @property
    def prompts_at_once(self) -> int:
        return self.scorers[0].prompts_at_once

    def __call__(self, prompts: Sequence[str]) -> list[dict[str, list]]:
        """As :meth:`Scorer.__call__`, with lists as long as noises were needed."""
        values: list[dict[str, list]] = [{} for _ in prompts]
        undecided = list(range(len(prompts)))
        for noises, scorer in zip(ROUNDS, self.scorers, strict=True):
            for i, new in zip(undecided, scorer([prompts[i] for i in undecided]), strict=True):
                for name, added in new.items():
                    values[i].setdefault(name, []).extend(added)
            undecided = [i for i in undecided if noises_needed(values[i][self.detector], self.bands) > noises]
            if not undecided:
                break
        return values


def as_rows(values: dict[str, Tensor], names: Sequence[str]) -> list[dict[str, list]]:
    """Values ``(rows, noises, ...)`` as a dict a row, rounded.

    Raises:
        InputError: a value is not finite; names the row by ``names``.
    """
    columns = {name: _rounded(value.float().cpu().tolist()) for name, value in values.items()}
    for name, value in values.items():
        check_finite(value, name, names)
    return [{name: rows[i] for name, rows in columns.items()} for i in range(len(names))]


def _rounded(value: Any) -> Any:
    """Six significant digits: what the last bits of a float32 sum, which vary with the batch size, leave alone."""
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return float(f"{value:.6g}")
