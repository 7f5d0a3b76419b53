"""What a mitigation is given and what it gives back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from local_sd_pipeline import UnconditionalPrediction
from memorization.detectors.base import OneStepDetector, PromptDetector
from memorization.models.base import TextToImage
from memorization.models.generation import Guide, detection_grid
from memorization.models.predictor import Predictor


@dataclass
class Case:
    """Some prompts on some noises, and the scores that a mitigation may lower. Every prompt is treated as if alone.

    Args:
        prompts: their number is k.
        embeds: ``(k, ...)``, float32.
        noise: x_T, ``(noises, c, h, w)``, the same for every prompt.
        detectors: by name; those that need no generation.
        levels: detector -> share of prompts that are not memorized -> the score below which that share lies.
        steps: of a generation.
        grid_steps: of the grid that places the detectors' timesteps.
        guidance_scale: of the generation.
        seed: of what a mitigation draws.
        batch_size: rows to a call of the denoiser.

    Attributes:
        grid: timesteps of the grid.
        uncond: predictions without a prompt on ``noise``, at every timestep that a detector reads.
    """

    pipe: TextToImage
    prompts: list[str]
    embeds: Tensor
    noise: Tensor
    detectors: dict[str, OneStepDetector]
    levels: Mapping[str, Mapping[float, float]]
    steps: int = 50
    grid_steps: int = 50
    guidance_scale: float = 7.5
    seed: int = 51
    batch_size: int = 32
    grid: list[int] = field(init=False)
    uncond: UnconditionalPrediction = field(init=False)

    def __post_init__(self) -> None:
        self.grid = detection_grid(self.pipe, self.grid_steps)
        timesteps = {self.grid[place] for detector in self.detectors.values() for place in detector.steps}
        with torch.no_grad():
            self.uncond = self.pipe.predict_uncond(self.noise, sorted(timesteps), self.batch_size)

    def score(self, name: str, embeds: Tensor) -> Tensor:
        """Mean over the noises of a detector's score, ``(len(embeds),)``; differentiable in ``embeds``."""
        detector = self.detectors[name]
        timesteps = [self.grid[place] for place in detector.steps]
        trace = self.pipe.trace(embeds, self.noise, timesteps, self.uncond, self.batch_size)
        points = [trace[t] for t in timesteps]
        if isinstance(detector, PromptDetector):
            return detector(points)[name].mean(1)
        return detector(points, Predictor(self.pipe, embeds, self.uncond.embedding, self.batch_size))[name].mean(1)


@dataclass(frozen=True)
class Remedy:
    """What the sampler takes instead of a case's own.

    Attributes:
        prompts: the text, where it was changed.
        embeds: ``(k, ...)``.
        latents: start noise, ``(k, noises, c, h, w)``.
        guide: rows ``(r,)`` of k x noises, flattened -> a fresh ``Guide`` for their generation.
        around: the same -> a context that holds during their generation.
        iterations: how many steps or rounds each prompt took.
    """

    prompts: Sequence[str]
    embeds: Tensor
    latents: Tensor
    guide: Callable[[Tensor], Guide] | None = None
    around: Callable[[Tensor], AbstractContextManager] | None = None
    iterations: Sequence[int] = field(default_factory=list)

    @property
    def scorable(self) -> bool:
        """Whether a score of embeddings and noise says all: not where the sampler itself is changed."""
        return self.guide is None and self.around is None

    @classmethod
    def unchanged(cls, case: Case, **changed) -> Remedy:
        """The case as it is, but for what is given."""
        latents = case.noise.expand(len(case.prompts), *case.noise.shape)
        unchanged = cls(case.prompts, case.embeds, latents, iterations=[0] * len(case.prompts))
        return replace(unchanged, **changed)
