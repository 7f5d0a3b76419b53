"""How much more sharply the log density bends with the prompt than without it, at each pixel of the finished picture.

Kim, Lee, ICML 2026 (arXiv 2605.26756). H the Hessian of a log density, the Jacobian of its score s = -eps / sigma_t, at
alpha_t z0, z0 the final latents, t near 0:

    sum over channels of diag(-H_c) - diag(-H_u),   diag(-H) = E[v * J_eps v] / sigma_t

(Hutchinson), v of random signs, J_eps v by the central difference (eps(x + h v) - eps(x - h v)) / 2h, h in units of
sigma_t. Four evaluations a probe.

Deviation: the base that the prompt is compared with is the unconditional prediction; theirs may be an older model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from memorization.localisation.base import MAPS, Map
from memorization.models.probes import random_signs
from memorization.settings import Count, Positive, Seed, Timestep

if TYPE_CHECKING:
    from memorization.models.generation import Step
    from memorization.models.predictor import Predictor


@MAPS.register
@dataclass(frozen=True)
class Curvature(Map):
    """``curvature``: ``(rows, h, w)``, of either sign.

    Args:
        timestep: t.
        probes: directions v, the same for every row.
        step: h, of the differences.
        seed: of the directions.
    """

    timestep: Timestep = 10
    probes: Count = 16
    step: Positive = 0.1
    seed: Seed = 0

    name: ClassVar[str] = "curvature"
    takes_differences: ClassVar[bool] = True

    def __call__(self, last: Step, predict: Predictor) -> Tensor:
        alpha, sigma = predict.noise_scales(self.timestep)
        generator = torch.Generator().manual_seed(self.seed)
        signs, h = (
            random_signs((self.probes, *last.after.shape[1:]), generator).to(last.after.device),
            self.step * sigma,
        )
        points = alpha * last.after[:, None] + h * torch.cat([signs, -signs])  # (rows, 2 probes, c, h, w)

        def diagonal(cond: bool) -> Tensor:
            ahead, behind = predict(points, self.timestep, cond).chunk(2, dim=1)
            return ((ahead - behind) * signs / (2 * h)).mean(1) / sigma

        return (diagonal(cond=True) - diagonal(cond=False)).sum(1)
