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
    due: Tensor = field(init=False)  # step of each row's next look
    named: Tensor = field(init=False)  # training picture whose caption a row is steered from; -1 before there is one
    until: Tensor = field(init=False)  # step at which each row's deduplication ends

    def __call__(self, step: int, point: NoisePrediction) -> Tensor:
        eps = point.uncond + self.scale * point.guidance
        if step == 0:
            self.due, self.until = torch.zeros(2, len(eps), dtype=torch.long, device=eps.device)
            self.named = torch.full_like(self.due, -1)
        rows = (self.due <= step).nonzero()[:, 0]
        if len(rows) == 0:
            return eps
        gate = self.terms.gate(point.timestep)
        again = self.terms.second_look and "sim" in self.guidances
        neighbours, sigma, excess, gradient = self._look(point, rows, eps[rows], gate, not again)
        opened = excess > 0
        held = self._held(step, rows, neighbours, opened)
        self.due[rows] = step + torch.where(opened | held | self.terms.ungated_spe, 1, self.every)
        m = sigma + 2 if self.nearest.measure == "nl2" else sigma
        s1, s2 = self.terms.scales(m, self.scale, "spe" in self.guidances)
        s1 = s1 * (opened | self.terms.ungated_spe)
        s2 = s2 * held
        change = -_wide(s1) * point.guidance[rows]
        if (duplicated := s2 > 0).any():
            change[duplicated] -= _wide(s2[duplicated]) * self._dup(point, rows[duplicated])
        after = (sigma, excess, gradient)
        if again:
            _, *after = self._look(point, rows, eps[rows] + change, gate)
        sim = self._sim(point, *after)
        change += sim
        share = sim.flatten(1).norm(dim=1) / eps[rows].flatten(1).norm(dim=1)
        self.looks.append(Look(point.timestep, gate, *(x.cpu() for x in (rows, sigma, opened, s1, s2, share))))
        acted = opened | (s1 > 0) | (s2 > 0)
        eps = eps.clone()  # rows with a closed gate stay as they are, to the bit
        eps[rows[acted]] += change[acted]
        return eps

    def _look(
        self, point: NoisePrediction, rows: Tensor, eps: Tensor, gate: float, slope: bool = True
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Neighbours of the clean pictures that ``eps`` implies for ``rows``, sigma, how far it lies above the gate,
        and its gradient in x0: 0 where the gate is closed, and where no ``slope`` is asked for.

        Raises:
            FloatingPointError: sigma or its gradient is not finite.
        """
        x0 = (point.latents[rows] - point.sigma * eps) / point.alpha
        looked = [self._look_at(chunk, gate, slope and "sim" in self.guidances) for chunk in x0.split(AT_ONCE)]
        neighbours, sigma, excess, gradient = (torch.cat(parts) for parts in zip(*looked, strict=True))
        return neighbours, sigma, excess, gradient

    def _look_at(self, x0: Tensor, gate: float, slope: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        clean = x0.detach().requires_grad_(slope)
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

    def _held(self, step: int, rows: Tensor, neighbours: Tensor, opened: Tensor) -> Tensor:
        """Whether deduplication acts on ``rows``: while the gate is open, and for ``hold`` steps from then on, once the
        caption of a nearest picture was found often enough; it is that of the last such picture."""
        if "dup" not in self.guidances:
            return torch.zeros_like(opened)
        often = torch.tensor(self.nearest.index.multiplicity(neighbours)) >= self.terms.min_captions
        self.named[rows] = torch.where(often.to(rows.device), neighbours[:, 0], self.named[rows])
        triggered = opened & (self.named[rows] >= 0)
        self.until[rows] = torch.where(triggered, step + self.terms.hold, self.until[rows])
        return step < self.until[rows]

    def _dup(self, point: NoisePrediction, rows: Tensor) -> Tensor:
        """eps(x_t, y_N) - eps_u of ``rows``."""
        captions = [self.nearest.index.captions[i] for i in self.named[rows].tolist()]
        assert self.caption_eps is not None  # dup needs it
        return self.caption_eps(point.latents[rows], point.timestep, captions) - point.uncond[rows]

    def _sim(self, point: NoisePrediction, sigma: Tensor, excess: Tensor, gradient: Tensor) -> Tensor:
        """Equation 17; d x0_hat / d x_t is 1 / alpha, since eps_hat is held constant."""
        weight = self.terms.sim_weight(sigma, excess, point.timestep) * point.sigma / point.alpha
        return _wide(weight) * gradient


def _wide(v: Tensor) -> Tensor:
    """``(n,)`` -> ``(n, 1, 1, 1)``."""
    return v[:, None, None, None]
