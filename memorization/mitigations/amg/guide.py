"""What AMG does at each step of a generation; amg.py has its formulas."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from local_sd_pipeline import NoisePrediction
from memorization.mitigations.amg.nearest import Nearest
from memorization.mitigations.amg.terms import Terms

AT_ONCE = 8  # pictures that are decoded together


class Look(NamedTuple):
    """What one look at the nearest training pictures said, on the CPU."""

    timestep: int
    gate: float
    rows: Tensor  # that were looked at
    sigma: Tensor
    open: Tensor
    s1: Tensor
    s2: Tensor
    sim: Tensor  # length of G_sim in units of that of eps_hat


@dataclass
class AntiMemorization:
    """The guide of one batch of rows: call it at every step of their generation.

    Args:
        scale: s0.
        describe: x0_hat -> features as the index holds them, differentiable.
        caption_eps: (latents, timestep, captions) -> eps under other captions; needed for ``dup`` alone.

    Attributes:
        looks: what was seen, for pictures and tables.
    """

    nearest: Nearest
    terms: Terms
    guidances: frozenset[str]
    scale: float
    every: int
    describe: Callable[[Tensor], Tensor]
    caption_eps: Callable[[Tensor, int, list[str]], Tensor] | None = None
    looks: list[Look] = field(default_factory=list)
    due: Tensor | None = None  # step of each row's next look

    def __call__(self, step: int, point: NoisePrediction) -> Tensor:
        eps = point.uncond + self.scale * point.guidance
        if self.due is None:
            self.due = torch.zeros(len(eps), dtype=torch.long)
        rows = (self.due <= step).nonzero()[:, 0].to(eps.device)
        if len(rows) == 0:
            return eps
        x0 = (point.latents[rows] - point.sigma * eps[rows]) / point.alpha
        gate = self.terms.gate(point.timestep)
        looked = [self._look(chunk, gate) for chunk in x0.split(AT_ONCE)]
        neighbours, sigma, excess, gradient = (torch.cat(parts) for parts in zip(*looked, strict=True))
        opened = excess > 0
        self.due[rows.cpu()] = step + torch.where(opened | self.terms.ungated_spe, 1, self.every).cpu()
        m = sigma + 2 if self.nearest.measure == "nl2" else sigma
        s1, s2 = self.terms.scales(m, self.scale, "spe" in self.guidances)
        s1 = s1 * (opened | self.terms.ungated_spe)
        s2 = s2 * opened * ("dup" in self.guidances) * self._often(neighbours).to(s2)
        change = -_wide(s1) * point.guidance[rows]
        if (duplicated := s2 > 0).any():
            change[duplicated] -= _wide(s2[duplicated]) * self._dup(point, rows, neighbours, duplicated)
        weight = self.terms.sim_weight(sigma, excess, point.timestep) * point.sigma / point.alpha
        sim = _wide(weight) * gradient  # equation 17; d x0_hat / d x_t is 1 / alpha, since eps_hat is held constant
        change += sim
        share = sim.flatten(1).norm(dim=1) / eps[rows].flatten(1).norm(dim=1)
        self.looks.append(Look(point.timestep, gate, *(x.cpu() for x in (rows, sigma, opened, s1, s2, share))))
        acted = opened | (s1 > 0)
        eps = eps.clone()  # rows with a closed gate stay as they are, to the bit
        eps[rows[acted]] += change[acted]
        return eps

    def _look(self, x0: Tensor, gate: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Neighbours, sigma, how far it lies above the gate, and its gradient in x0, 0 where the gate is closed.

        Raises:
            FloatingPointError: sigma or its gradient is not finite.
        """
        clean = x0.detach().requires_grad_("sim" in self.guidances)
        with torch.set_grad_enabled(clean.requires_grad):
            features = self.describe(clean)
            neighbours = self.nearest.find(features.detach()).to(x0.device)
            sigma = self.nearest.nearness(features, neighbours)
        excess = sigma.detach() + (gate if self.nearest.measure == "nl2" else -gate)
        gradient = torch.zeros_like(x0)
        if clean.requires_grad and (excess > 0).any():
            (gradient,) = torch.autograd.grad(sigma, clean, (excess > 0).to(sigma))
        if not (sigma.isfinite().all() and gradient.isfinite().all()):
            raise FloatingPointError("amg: the nearness to the training pictures, or its gradient, is NaN or infinite")
        return neighbours, sigma.detach(), excess, gradient

    def _often(self, neighbours: Tensor) -> Tensor:
        return torch.tensor(self.nearest.index.multiplicity(neighbours)) >= self.terms.min_captions

    def _dup(self, point: NoisePrediction, rows: Tensor, neighbours: Tensor, chosen: Tensor) -> Tensor:
        """eps(x_t, y_N) - eps_u of the chosen rows."""
        captions = [self.nearest.index.captions[i] for i in neighbours[chosen, 0].tolist()]
        places = rows[chosen]
        assert self.caption_eps is not None  # dup needs it
        return self.caption_eps(point.latents[places], point.timestep, captions) - point.uncond[places]


def _wide(v: Tensor) -> Tensor:
    """``(n,)`` -> ``(n, 1, 1, 1)``."""
    return v[:, None, None, None]
