"""AMG, anti-memorization guidance: steer away from the nearest training picture, while the picture is being made.

Chen, Liu, Xu, "Towards Memorization-Free Diffusion Models", CVPR 2024 (arXiv 2404.00922), equations 7 to 17. With
x0_hat the clean picture that eps_hat = eps_u + s0 (eps_c - eps_u) implies, n_0 the training picture nearest to it,
sigma its nearness and lambda_t a gate that rises towards the last step:

    eps_hat += 1{sigma > lambda_t} (G_spe + G_dup + G_sim)
    G_spe = -s1 (eps_c - eps_u),           s1 = max(min(c1 m, s0 - 1), 0)         despecification
    G_dup = -s2 (eps(x_t, y_N) - eps_u),   s2 = max(min(c2 m, s0 - s1 - 1), 0)    y_N: the caption of n_0
    G_sim = c3 s grad_{x_t} sigma                                                 dissimilarity

The gradient holds eps_hat constant, so it passes through the decoder alone; its sign is the one that lowers sigma.

Deviations. m is sigma for cosines, but sigma + 2 for nL2, whose sigma is never positive: else s1 and s2 were always 0.
A row whose gate is closed looks again after ``every`` steps only, a row whose gate is open at every step: the decoder
and the search are paid where something is near. The published code looks twice a step, but leaves the first 21
pictures alone. c1 and c2 are those of its Stable Diffusion script, the gates those of its scripts; c3 is ours, since
its unit depends on the model.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from functools import cache
from pathlib import Path
from typing import ClassVar, NamedTuple

import torch
import yaml
from torch import Tensor

from local_sd_pipeline import NoisePrediction
from memorization.errors import InputError
from memorization.index import Index
from memorization.mitigations.case import Case, Guide, Remedy
from memorization.models import CONFIGS
from memorization.sampling import decode_pixels
from memorization.similarity.nearest import Nearest

GUIDANCES = ("spe", "dup", "sim")


@dataclass(frozen=True)
class Terms:
    """Constants of the three guidances and their gate; configs/mitigations/amg.yaml explains them."""

    gate_start: float
    gate_end: float
    gate_decay: float
    c1: float
    c2: float
    c3: float
    ungated_spe: bool = False
    relative_dup: bool = False  # c2 counts in units of s0 - s1 - 1
    min_captions: int = 1
    sim_above: float | str | None = None  # the weight is c3 times the excess over this, or over the "gate"
    sim_rate: float = 0.0  # by which its logarithm grows a timestep

    def gate(self, t: float) -> float:
        """Where the gate stands at timestep ``t``, in the unit of the measure."""
        return self.gate_start + (self.gate_end - self.gate_start) * math.exp(-self.gate_decay * t)

    def scales(self, m: Tensor, s0: float) -> tuple[Tensor, Tensor]:
        """(s1, s2) of equations 13 and 15; s1 + s2 <= s0 - 1."""
        room = max(s0 - 1, 0.0)
        s1 = (self.c1 * m).clamp(0, room)
        left = room - s1
        s2 = self.c2 * m * (left if self.relative_dup else 1)
        return s1, torch.minimum(s2.clamp_min(0), left)

    def sim_weight(self, sigma: Tensor, excess: Tensor, t: float) -> Tensor:
        """The factor of s * grad sigma; ``excess``: how far sigma lies above the gate."""
        factor = torch.ones_like(sigma)
        if self.sim_above is not None:
            factor = excess if self.sim_above == "gate" else (sigma - self.sim_above).clamp_min(0)
        return self.c3 * math.exp(self.sim_rate * (1000 - t)) * factor


def find_terms(preset: str, measure: str, strength: float = 1.0, **changed: float) -> Terms:
    """A preset's constants for a measure (``nl2`` or ``cosine``); its gate is ``strength`` times as far away.

    Raises:
        InputError: there is none.
    """
    presets = yaml.safe_load((CONFIGS / "mitigations" / "amg.yaml").read_text(encoding="utf-8"))
    if measure not in presets.get(preset, {}):
        known = ", ".join(name for name, measures in presets.items() if measure in measures)
        raise InputError(f"amg: no preset {preset!r} for {measure}; there are: {known}")
    terms = Terms(**presets[preset][measure])
    terms = replace(terms, **{name: value for name, value in changed.items() if value is not None})
    factor = strength if measure == "nl2" else 1 / strength
    return replace(terms, gate_start=terms.gate_start * factor, gate_end=terms.gate_end * factor)


class Look(NamedTuple):
    """What one look at the nearest training pictures said."""

    timestep: int
    rows: Tensor  # that were looked at
    sigma: Tensor
    open: Tensor
    gate: float
    s1: Tensor
    s2: Tensor
    neighbours: Tensor  # the nearest of each


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
            neighbours = self.nearest.find(pictures)
            sigma = self.nearest.nearness(pictures, neighbours)
        nl2 = self.nearest.measure == "nl2"
        gate = self.terms.gate(point.timestep)
        excess = sigma + gate if nl2 else sigma - gate
        opened = excess > 0
        self.due[rows.cpu()] = step + torch.where(opened, 1, self.every).cpu()
        s1, s2 = self.terms.scales(sigma + 2 if nl2 else sigma, self.scale)
        s1 = s1 * (opened | self.terms.ungated_spe) * ("spe" in self.guidances)
        s2 = s2 * opened * ("dup" in self.guidances) * self._often(neighbours).to(s2)
        self.looks.append(Look(point.timestep, rows, sigma, opened, gate, s1, s2, neighbours[:, 0]))
        change = -s1[:, None, None, None] * point.guidance[rows]
        if (duplicated := s2 > 0).any():
            change[duplicated] -= s2[duplicated, None, None, None] * self._dup(point, rows, neighbours, duplicated)
        if opened.any() and "sim" in self.guidances:
            change[opened] += self._sim(point, x0[opened], neighbours[opened], sigma[opened], excess[opened])
        acted = opened | (s1 > 0)
        eps = eps.clone()  # rows with a closed gate stay as they are, to the bit
        eps[rows[acted]] += change[acted]
        return eps

    def _often(self, neighbours: Tensor) -> Tensor:
        return torch.tensor(self.nearest.index.multiplicity(neighbours)) >= self.terms.min_captions

    def _dup(self, point: NoisePrediction, rows: Tensor, neighbours: Tensor, chosen: Tensor) -> Tensor:
        """eps(x_t, y_N) - eps_u of the chosen rows."""
        captions = [self.nearest.index.captions[i] for i in neighbours[chosen.to(neighbours.device), 0].tolist()]
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


@cache
def open_index(folder: str) -> Index:
    """An index, opened once."""
    return Index(Path(folder))


@dataclass(frozen=True)
class AMG:
    """``amg``. ``strength``: how much farther than the preset's gate a picture must stay: nL2 times, cosine over it.

    Args:
        index: folder of an index of training pictures (python -m memorization.index build).
        preset: of configs/mitigations/amg.yaml.
        guidances: any of spe, dup and sim, joined by +.
        every: steps until a row whose gate is closed looks again.
        gate_start, gate_end, gate_decay, c1, c2, c3, sim_rate: instead of the preset's.
    """

    strength: float = 1.0
    index: str = ""
    preset: str = "paper-main"
    guidances: str = "spe+dup+sim"
    every: int = 3
    gate_start: float | None = None
    gate_end: float | None = None
    gate_decay: float | None = None
    c1: float | None = None
    c2: float | None = None
    c3: float | None = None
    sim_rate: float | None = None

    name: ClassVar[str] = "amg"
    strengths: ClassVar[tuple[float, ...]] = (0.8, 0.9, 1.0, 1.15, 1.3)

    def __post_init__(self) -> None:
        if unknown := set(self.guidances.split("+")) - {*GUIDANCES, "none"}:
            raise InputError(f"amg: no guidance {', '.join(sorted(unknown))}; there are: {', '.join(GUIDANCES)}")

    def terms(self, measure: str) -> Terms:
        """The constants for an index of this measure."""
        names = [f.name for f in fields(self) if f.name.startswith(("gate_", "c", "sim_"))]
        return find_terms(self.preset, measure, self.strength, **{name: getattr(self, name) for name in names})

    def nearest(self) -> Nearest:
        """The index that was named.

        Raises:
            InputError: none was, or it has no gradient.
        """
        if not self.index:
            raise InputError("amg needs an index of training pictures: python -m memorization.index build makes one")
        nearest = Nearest(open_index(self.index))
        if nearest.index.kind == "sscd" and "sim" in self.guidances:
            raise InputError("amg: SSCD's ONNX export has no gradient; index pixels or clip, or leave out sim")
        return nearest

    def guide(self, case: Case) -> AntiMemorization:
        """A fresh guide for a generation of rows of ``case``."""
        nearest, pipe = self.nearest(), case.pipe
        embed = cache(lambda caption: pipe.embed([caption])[0])

        def caption_eps(latents: Tensor, timestep: int, captions: list[str]) -> Tensor:
            return pipe.predict_noise(latents, timestep, torch.stack([embed(caption) for caption in captions]))

        return AntiMemorization(
            nearest, self.terms(nearest.measure), frozenset(self.guidances.split("+")), case.guidance_scale,
            int(self.every), lambda latents: decode_pixels(pipe, latents), caption_eps,
        )  # fmt: skip

    def __call__(self, case: Case) -> Remedy:
        self.nearest()
        return Remedy.unchanged(case, guide=lambda rows: self.guide(case))


__all__ = ["AMG", "AntiMemorization", "Guide", "Look", "Terms", "find_terms"]
