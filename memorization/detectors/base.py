"""What a detector is given and what it gives. Higher values mean memorized.

What a detector ``needs`` says what it is given:

- ``prompt``: noise predictions at its ``steps`` of the DDIM grid, on pure noise. All of them share one trace, so
  running more of them costs no UNet call.
- ``gradient``: the same, and the model, to ask it again near by.
- ``generation``: every step of a guided generation, which all of them share. ``reduce`` keeps little of each step;
  called with what was kept, the detector gives its values.
- ``image``: clean latents (the end of the shared generation, or a picture of the user's) and the model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from memorization.models.generation import Step
from memorization.models.predictor import Predictor

if TYPE_CHECKING:
    from local_sd_pipeline import NoisePrediction


NEEDS = ("prompt", "gradient", "generation", "image")


class Detector(Protocol):
    """What every detector offers."""

    name: str
    needs: str  # one of NEEDS
    terms: tuple[str, ...]  # the values it gives, its own name first; the others are its terms


class PromptDetector(Detector, Protocol):
    """Needs ``prompt``: a pure function of the trace."""

    steps: tuple[int, ...]  # places in the DDIM grid whose trace it reads: 0 the noisiest, -1 the last

    def __call__(self, trace: list[NoisePrediction]) -> dict[str, Tensor]:
        """Values ``(prompts, noises)`` under each name of ``terms``, from the predictions at ``steps``."""


class GradientDetector(Detector, Protocol):
    """Needs ``gradient``: a function of the trace and of the model near by."""

    steps: tuple[int, ...]

    def __call__(self, trace: list[NoisePrediction], predict: Predictor) -> dict[str, Tensor]:
        """Values ``(prompts, noises)``; rows of ``predict`` are prompts, its points are noises."""


class GenerationDetector(Detector, Protocol):
    """Needs ``generation``.

    One that reads the attention also has ``attention_steps(steps)``: the indices at which it is to be recorded.
    """

    def reduce(self, step: Step, predict: Predictor) -> Tensor:
        """What to keep of a step, ``(rows, ...)``."""

    def __call__(self, kept: Tensor) -> dict[str, Tensor]:
        """Values ``(rows,)``, or curves ``(rows, k)``, from what was kept, ``(steps, rows, ...)``."""


class ImageDetector(Detector, Protocol):
    """Needs ``image``."""

    def __call__(self, clean: Tensor, predict: Predictor) -> dict[str, Tensor]:
        """Values ``(rows,)`` from clean scaled latents ``(rows, c, h, w)``."""
