"""SAIL: other start noise, from which the prompt is not pulled to a training image.

Jeon, Kim, No, "Understanding and Mitigating Memorization in Generative Models via Sharpness of Probability Landscapes",
ICML 2025, section 5: Adam on x_T (0.05; at most 10 steps there, 20 here) with

    || d(x_T + u) || + alpha || x_T ||,   u the unit vector along d(x_T),

accepted at a bound. Deviations from the public code: u is computed at the latents of every step, not at those of before
the first; every noise is optimised once, so no two pictures come from one latent; the bound is a level of || d || among
prompts that are not memorized plus alpha times the usual size of x_T, sqrt(its dimension), and it does not grow. That
level is of means over the noises, while every noise is held to it by itself. Of a flow || d || is noise_norm.py's D,
which is over sqrt(d), and so is || x_T ||; u lies along the difference of velocities.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from memorization.mitigations.base import MITIGATIONS, Mitigation
from memorization.mitigations.case import Case, Remedy
from memorization.models.base import unit_of
from memorization.settings import Count, NotNegative, Positive
from optim_utils import descend


@MITIGATIONS.register
@dataclass(frozen=True)
class Sail(Mitigation):
    """``sail``.

    Args:
        strength: the level of ``noise_norm`` to reach.
        target: the norm to reach, instead.
        alpha: weight of the size of x_T; .05 for SD 1.4, .01 for SD 2.
    """

    strength: Positive = 0.5
    target: float | None = None
    alpha: NotNegative = 0.05
    lr: Positive = 0.05
    iterations: Count = 20

    name: ClassVar[str] = "sail"
    lowers: ClassVar[str] = "noise_norm"
    strengths: ClassVar[tuple[float, ...]] = (0.99, 0.9, 0.75, 0.5, 0.25)

    def __call__(self, case: Case) -> Remedy:
        noises = len(case.noise)
        embeds = case.embeds.repeat_interleave(noises, 0)
        empty = case.pipe.embed([""]).float()
        t = case.grid[0]
        start = case.noise.repeat(len(case.prompts), 1, 1, 1)
        unit, root = unit_of(case.pipe, t), start[0].numel() ** 0.5
        alpha = self.alpha / root if unit.kind == "flow" else self.alpha
        bound = self.bound(case.levels) + alpha * root

        def predicted(x: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
            pairs = torch.cat([empty.expand_as(embeds[rows]), embeds[rows]])
            uncond, cond = case.pipe.predict_noise(x.repeat(2, 1, 1, 1), t, pairs).chunk(2)
            return uncond, cond

        def loss(x: Tensor, rows: Tensor) -> Tensor:
            with torch.no_grad():
                uncond, cond = predicted(x, rows)
                d = cond - uncond
                u = d / d.flatten(1).norm(dim=1).clamp_min(1e-12)[:, None, None, None]
            return unit.norm(*predicted(x + u, rows)) + alpha * x.flatten(1).norm(dim=1)

        parts = []
        for rows in torch.arange(len(start), device=start.device).split(max(1, case.batch_size // 2)):
            parts.append(descend(
                lambda x, local, rows=rows: loss(x, rows[local]), start[rows], lr=self.lr, iterations=self.iterations,
                target=bound,
            ))  # fmt: skip
        latents = torch.cat([part.best for part in parts]).unflatten(0, (-1, noises))
        steps = torch.cat([part.steps for part in parts]).unflatten(0, (-1, noises))
        return Remedy.unchanged(case, latents=latents, iterations=steps.amax(1).tolist())
