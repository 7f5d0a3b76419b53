"""The cases of a run: what all its prompts share, in one place."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from memorization.detectors.base import (
    DETECTORS,
    SCORED_BY,
    GradientDetector,
    OneStepDetector,
    PromptDetector,
    make_detectors,
)
from memorization.errors import InputError
from memorization.evaluation.calibration import Calibration
from memorization.mitigations.base import Levels, Mitigation
from memorization.mitigations.case import Case
from memorization.models.base import TextToImage
from memorization.models.spec import ModelSpec
from memorization.settings import fitted


@dataclass(frozen=True)
class Cases:
    """Makes cases: everything of a :class:`Case` but its prompts, which are embedded here.

    Args:
        noise: x_T, ``(noises, c, h, w)``, the same for every prompt.
    """

    pipe: TextToImage
    noise: Tensor
    steps: int
    guidance_scale: float
    seed: int
    batch_size: int
    detectors: dict[str, OneStepDetector] = field(default_factory=dict)
    levels: Levels = field(default_factory=dict)
    grid_steps: int = 50

    def __call__(self, prompts: Sequence[str], batch_size: int | None = None) -> Case:
        """The case of some prompts, with ``batch_size`` rows to a UNet call instead of the run's."""
        with torch.no_grad():
            embeds = self.pipe.embed(prompts).float()
        return Case(
            pipe=self.pipe, prompts=list(prompts), embeds=embeds, noise=self.noise, detectors=self.detectors,
            levels=self.levels, steps=self.steps, grid_steps=self.grid_steps, guidance_scale=self.guidance_scale,
            seed=self.seed, batch_size=batch_size or self.batch_size,
        )  # fmt: skip

    @property
    def at_once(self) -> int:
        """Prompts to a batch: as many as fill a UNet call."""
        return max(1, self.batch_size // len(self.noise))

    def batches(self, prompts: Sequence[str]) -> list[Case]:
        """The cases of a list, in batches."""
        return [self(prompts[start : start + self.at_once]) for start in range(0, len(prompts), self.at_once)]


def calibrated_settings(calibration: Calibration) -> dict[str, dict]:
    """Detector -> the settings that were fitted, and those beside them.

    Raises:
        InputError: the detector has no such setting, or a value makes no sense; names the file.
    """
    return {
        name: fitted(DETECTORS.find(name), own, f"{calibration.path}: {name}") if name in DETECTORS else own
        for name, own in calibration.settings.items()
    }


def scoring_detectors(
    mitigations: Iterable[Mitigation], spec: ModelSpec, calibration: Calibration
) -> dict[str, OneStepDetector]:
    """The detector that says which prompts are memorized, and those whose scores the mitigations lower.

    Raises:
        InputError: a mitigation lowers what needs a generation.
    """
    names = dict.fromkeys([SCORED_BY, *(mitigation.lowers for mitigation in mitigations if mitigation.lowers)])
    settings = spec.settings_of("detectors", DETECTORS)
    for name, own in calibrated_settings(calibration).items():
        settings[name] = {**settings.get(name, {}), **own}
    made = make_detectors(list(names), settings)
    fit = {detector.name: detector for detector in made if isinstance(detector, (PromptDetector, GradientDetector))}
    if unfit := [name for name in names if name not in fit]:
        raise InputError(f"{unfit[0]}: cannot be lowered; a mitigation lowers a score that needs no generation")
    return fit
