"""What a detector is given and what it gives. Higher values mean memorized.

What a detector ``needs`` says what it is given:

- ``prompt``: predictions at its ``steps`` of the DDIM grid, on pure noise. All of them share one trace, so
  running more of them costs no UNet call.
- ``gradient``: the same, and the model, to ask it again elsewhere.
- ``generation``: every step of a guided generation, which all of them share. ``reduce`` keeps little of each step;
  called with what was kept, the detector gives its values.
- ``image``: clean latents (the end of the shared generation, or a picture of the user's) and the model.

A detector is a frozen dataclass that derives from one of the four and is registered::

    @DETECTORS.register
    @dataclass(frozen=True)
    class Mine(PromptDetector):
        weight: Positive = 1.0
        name: ClassVar[str] = "mine"
        steps: ClassVar[tuple[int, ...]] = (0,)
        terms: ClassVar[tuple[str, ...]] = ("mine",)

        def __call__(self, trace):
            return {"mine": self.weight * trace[0].norm}
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from memorization.registry import Registry
from memorization.settings import Checked

if TYPE_CHECKING:
    from torch import Tensor

    from local_sd_pipeline import NoisePrediction
    from memorization.models.generation import Step
    from memorization.models.predictor import Predictor

NEEDS = ("prompt", "gradient", "generation", "image")


class Detector(Checked, ABC):
    """What every detector offers.

    Attributes:
        needs: what it is given, one of ``NEEDS``.
        terms: the values it gives, its own name first; the others are its terms.
        curves: of the values it gives, those that are curves and no scores.
        weights: setting -> the term that it weighs in the score; a calibration fits these settings.
        takes_differences: whether it asks the model at points near by, whose small differences need float32.
        asks: what of a model it needs that not every one has, of ``ABILITIES`` in memorization/models/base.py.
    """

    name: ClassVar[str]
    needs: ClassVar[Literal["prompt", "gradient", "generation", "image"]]
    terms: ClassVar[tuple[str, ...]] = ()
    curves: ClassVar[tuple[str, ...]] = ()
    weights: ClassVar[Mapping[str, str]] = {}
    takes_differences: ClassVar[bool] = False
    asks: ClassVar[tuple[str, ...]] = ()

    @property
    def forward_mode(self) -> bool:
        """Whether it takes Jacobian-vector products, which group norms in the channels-last format have not."""
        return False

    def record(self) -> dict:
        """Everything that its values depend on, and their names, for a run's settings."""
        names = {key: list(value) for key in ("terms", "curves") if (value := getattr(self, key)) or key == "terms"}
        return {**vars(self), **names}


class PromptDetector(Detector):
    """Needs ``prompt``: a pure function of the trace.

    Attributes:
        steps: places in the DDIM grid whose trace it reads: 0 the noisiest, -1 the last.
    """

    needs = "prompt"
    steps: ClassVar[tuple[int, ...]]

    @abstractmethod
    def __call__(self, trace: list[NoisePrediction]) -> dict[str, Tensor]:
        """Values ``(prompts, noises)`` under each name of ``terms``, from the predictions at ``steps``."""


class GradientDetector(Detector):
    """Needs ``gradient``: a function of the trace and of the model near by."""

    needs = "gradient"
    takes_differences: ClassVar[bool] = True
    steps: ClassVar[tuple[int, ...]]

    @abstractmethod
    def __call__(self, trace: list[NoisePrediction], predict: Predictor) -> dict[str, Tensor]:
        """Values ``(prompts, noises)``; rows of ``predict`` are prompts, its points are noises."""


OneStepDetector = PromptDetector | GradientDetector  # what a trace suffices for, and a model to ask again


class GenerationDetector(Detector):
    """Needs ``generation``."""

    needs = "generation"

    def attention_steps(self, steps: int) -> Collection[int]:
        """Indices at which the attention is to be recorded, of a generation of ``steps``."""
        return ()

    def reads(self, steps: int) -> Mapping[str, int]:
        """Value -> how many of the first of ``steps`` steps it needs, where not all: it costs no more than these."""
        return {}

    @abstractmethod
    def reduce(self, step: Step, predict: Predictor) -> Tensor:
        """What to keep of a step, ``(rows, ...)``."""

    @abstractmethod
    def __call__(self, kept: Tensor) -> dict[str, Tensor]:
        """Values ``(rows,)``, or curves ``(rows, k)``, from what was kept, ``(steps, rows, ...)``."""


class ImageDetector(Detector):
    """Needs ``image``."""

    needs = "image"

    @abstractmethod
    def __call__(self, clean: Tensor, predict: Predictor) -> dict[str, Tensor]:
        """Values ``(rows,)`` from clean scaled latents ``(rows, c, h, w)``."""


DETECTORS: Registry[Detector] = Registry(
    "detector",
    "memorization.detectors",
    (
        "anisotropy", "noise_norm", "one_step", "fused", "second_look", "sharpness", "trajectory_norm",
        "bright_ending", "attention_entropy", "transition_norm", "trajectory_z", "guidance_flux", "p_laplace", "flipd",
        "two_guidances",
    ),
    "memorization.detectors",
)  # fmt: skip


DEFAULT_DETECTORS = ("anisotropy", "noise_norm")
DEFAULT_FOR_PICTURES = ("p_laplace",)
SCORED_BY = DEFAULT_DETECTORS[0]  # whose calibrated threshold says which prompts are to be mitigated


def make_detectors(names: Sequence[str], settings: Mapping[str, Mapping] | None = None) -> list[Detector]:
    """Detectors by name, each with its own settings; the name ``all`` stands for every one.

    Raises:
        InputError: there is none of a name, it has no such setting, or a value makes no sense.
    """
    chosen = list(DETECTORS) if list(names) == ["all"] else names
    return [DETECTORS.make(name, (settings or {}).get(name)) for name in dict.fromkeys(chosen)]
