"""How far the prompt's score lies from the unconditional one, at each pixel of the finished picture.

Kim, Lee, ICML 2026 (arXiv 2605.26756), the cheap proxy of their curvature. With the scores s = -eps / sigma_t at
alpha_t z0, z0 the final latents, t near 0:

    sum over channels of (s_c - s_u)^2

Deviation: the base that the prompt is compared with is the unconditional prediction; theirs may be an older model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from memorization.localisation.base import MAPS, Map
from memorization.settings import Timestep

if TYPE_CHECKING:
    from memorization.models.generation import Step
    from memorization.models.predictor import Predictor


@MAPS.register
@dataclass(frozen=True)
class ScoreDifference(Map):
    """``score_difference``: ``(rows, h, w)``, at least 0.

    Args:
        timestep: t.
    """

    timestep: Timestep = 10

    name: ClassVar[str] = "score_difference"

    def __call__(self, last: Step, predict: Predictor) -> Tensor:
        alpha, sigma = predict.noise_scales(self.timestep)
        centre = alpha * last.after[:, None]
        difference = predict(centre, self.timestep) - predict(centre, self.timestep, cond=False)
        return (difference[:, 0] / sigma).square().sum(1)
