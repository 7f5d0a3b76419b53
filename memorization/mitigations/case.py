"""What a mitigation is given and what it gives back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from local_sd_pipeline import LocalStableDiffusionPipeline, NoisePrediction
from memorization.detectors import PromptDetector
from memorization.errors import InputError

Guide = Callable[[int, NoisePrediction], Tensor]  # (step, prediction) -> the noise prediction that the sampler follows


@dataclass(frozen=True)
class Case:
    """Some prompts on some noises, and the scores that a mitigation may lower.

    Args:
        prompts: their number is k.
        embeds: ``(k, tokens, width)``, float32.
        noise: x_T, ``(images, c, h, w)``, the same for every prompt.
        detectors: by name; those that need a prompt alone.
        levels: detector -> share of prompts that are not memorized -> the score below which that share lies.
        steps: of a generation.
        grid_steps: of the DDIM grid that places the detectors' timesteps.
        guidance_scale: of the generation.
        seed: of what a mitigation draws.
        batch_size: rows to a UNet call.
    """

    pipe: LocalStableDiffusionPipeline
    prompts: list[str]
    embeds: Tensor
    noise: Tensor
    detectors: dict[str, PromptDetector]
    levels: dict[str, dict[float, float]]
    steps: int = 50
    grid_steps: int = 50
    guidance_scale: float = 7.5
    seed: int = 51
    batch_size: int = 32

    def score(self, name: str, embeds: Tensor) -> Tensor:
        """Mean over the noises of a detector's score, ``(len(embeds),)``; differentiable in ``embeds``."""
        detector, grid = self.detectors[name], self.pipe.detection_timesteps(self.grid_steps)
        timesteps = [grid[place] for place in detector.steps]
        with torch.no_grad():
            uncond = self.pipe.predict_uncond(self.noise, timesteps, self.batch_size)
        trace = self.pipe.trace(embeds, self.noise, timesteps, uncond, self.batch_size)
        return detector([trace[t] for t in timesteps])[name].mean(1)

    def target(self, name: str, level: float) -> float:
        """The score below which a share ``level`` of the prompts that are not memorized lies.

        Raises:
            InputError: the calibration does not say.
        """
        try:
            return self.levels[name][level]
        except KeyError:
            known = ", ".join(f"{share:g}" for share in self.levels.get(name, {})) or "none"
            raise InputError(f"{name}: the calibration holds no level {level:g} (it holds: {known})") from None


@dataclass(frozen=True)
class Remedy:
    """What the sampler takes instead of a case's own.

    Attributes:
        prompts: the text, where it was changed.
        embeds: ``(k, tokens, width)``.
        latents: start noise, ``(k, images, c, h, w)``.
        guide: rows ``(r,)`` of k x images, flattened -> a fresh :data:`Guide` for their generation.
        around: the same -> a context that holds during their generation.
        iterations: how many steps or rounds each prompt took.
    """

    prompts: Sequence[str]
    embeds: Tensor
    latents: Tensor
    guide: Callable[[Tensor], Guide] | None = None
    around: Callable[[Tensor], AbstractContextManager] | None = None
    iterations: Sequence[int] = field(default_factory=list)

    @classmethod
    def unchanged(cls, case: Case, **changed) -> Remedy:
        """The case as it is, but for what is given."""
        latents = case.noise.expand(len(case.prompts), *case.noise.shape)
        return cls(**{"prompts": case.prompts, "embeds": case.embeds, "latents": latents,
                      "iterations": [0] * len(case.prompts), **changed})  # fmt: skip
