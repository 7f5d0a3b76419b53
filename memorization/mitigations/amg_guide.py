"""What AMG does at each step of a generation; amg.py has its formulas."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from local_sd_pipeline import NoisePrediction
from memorization.mitigations.amg_terms import Terms
from memorization.similarity.nearest import Nearest


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
        decode: x0_hat -> pictures ``(n, 3, h, w)`` in [-1, 1], differentiable.
        caption_eps: (latents, timestep, captions) -> eps under other captions; needed for ``dup`` alone.

    Attributes:
        looks: what was seen, for pictures and tables.
    """

    nearest: Nearest
    terms: Terms
    guidances: frozenset[str]
    scale: float
    every: int
    decode: Callable[[Tensor], Tensor]
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
        with torch.no_grad():
            pictures = self.decode(x0)
            neighbours = self.nearest.find(pictures).to(eps.device)
            sigma = self.nearest.nearness(pictures, neighbours)
        if not sigma.isfinite().all():
            raise FloatingPointError("amg: the nearness to the training pictures is NaN or infinite")
        nl2 = self.nearest.measure == "nl2"
        gate = self.terms.gate(point.timestep)
        excess = sigma + gate if nl2 else sigma - gate
        opened = excess > 0
        self.due[rows.cpu()] = step + torch.where(opened | self.terms.ungated_spe, 1, self.every).cpu()
        s1, s2 = self.terms.scales(sigma + 2 if nl2 else sigma, self.scale, "spe" in self.guidances)
        s1 = s1 * (opened | self.terms.ungated_spe)
        s2 = s2 * opened * ("dup" in self.guidances) * self._often(neighbours).to(s2)
        change = -s1[:, None, None, None] * point.guidance[rows]
        if (duplicated := s2 > 0).any():
            change[duplicated] -= s2[duplicated, None, None, None] * self._dup(point, rows, neighbours, duplicated)
        sim = torch.zeros_like(change)
        if opened.any() and "sim" in self.guidances:
            sim[opened] = self._sim(point, x0[opened], neighbours[opened], sigma[opened], excess[opened])
        share = sim.flatten(1).norm(dim=1) / eps[rows].flatten(1).norm(dim=1)
        change += sim
        self.looks.append(Look(point.timestep, gate, *(x.cpu() for x in (rows, sigma, opened, s1, s2, share))))
        acted = opened | (s1 > 0)
        eps = eps.clone()  # rows with a closed gate stay as they are, to the bit
        eps[rows[acted]] += change[acted]
        return eps

    def _often(self, neighbours: Tensor) -> Tensor:
        return torch.tensor(self.nearest.index.multiplicity(neighbours)) >= self.terms.min_captions

    def _dup(self, point: NoisePrediction, rows: Tensor, neighbours: Tensor, chosen: Tensor) -> Tensor:
        """eps(x_t, y_N) - eps_u of the chosen rows."""
        captions = [self.nearest.index.captions[i] for i in neighbours[chosen, 0].tolist()]
        places = rows[chosen]
        return self.caption_eps(point.latents[places], point.timestep, captions) - point.uncond[places]

    def _sim(self, point: NoisePrediction, x0: Tensor, neighbours: Tensor, sigma: Tensor, excess: Tensor) -> Tensor:
        """Equation 17; d x0_hat / d x_t is 1 / alpha, since eps_hat is held constant."""
        parts = []
        for chunk, near in zip(x0.split(8), neighbours.split(8), strict=True):
            with torch.enable_grad():
                clean = chunk.detach().requires_grad_()
                (gradient,) = torch.autograd.grad(self.nearest.nearness(self.decode(clean), near).sum(), clean)
            parts.append(gradient / point.alpha)
        weight = self.terms.sim_weight(sigma, excess, point.timestep) * point.sigma
        return weight[:, None, None, None] * torch.cat(parts)
