"""What an embedded guidance scale changes at the first step: of models that were distilled from guided ones. Ours.

Such a model (Flux.1-dev) has no unconditional branch; it is given a guidance scale g beside the prompt. With two of
them, g1 < g2,

    || x0(c, g2) - x0(c, g1) || / (g2 - g1) / sqrt(d)

stands in for D = || x0_c - x0_u || / sqrt(d): were the model's output linear in g, as that of the guided model it was
distilled from, it would be D. ``noise_norm`` on such a model is another thing, true guidance with the empty prompt.
Nobody has tested either for memorization. Four evaluations a prompt and noise, of which two are the trace's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from memorization.detectors.base import DETECTORS, GradientDetector
from memorization.errors import InputError
from memorization.settings import NotNegative

if TYPE_CHECKING:
    from local_sd_pipeline import NoisePrediction
    from memorization.models.predictor import Predictor


@DETECTORS.register
@dataclass(frozen=True)
class TwoGuidances(GradientDetector):
    """``two_guidances``: values ``(prompts, noises)``, at least 0, higher means memorized.

    Args:
        low, high: g1 and g2.
    """

    low: NotNegative = 1.0
    high: NotNegative = 5.0

    name: ClassVar[str] = "two_guidances"
    steps: ClassVar[tuple[int, ...]] = (0,)
    terms: ClassVar[tuple[str, ...]] = ("two_guidances",)
    takes_differences: ClassVar[bool] = False
    asks: ClassVar[tuple[str, ...]] = ("guidance",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.low < self.high:
            raise InputError(f"two_guidances: low = {self.low:g} must be below high = {self.high:g}")

    def __call__(self, trace: list[NoisePrediction], predict: Predictor) -> dict[str, Tensor]:
        (first,) = trace
        latents = first.latents.expand_as(first.cond)
        low, high = (predict.raw(latents, first.timestep, guidance=g) for g in (self.low, self.high))
        return {"two_guidances": first.scale.pull(low, high) / (self.high - self.low)}
