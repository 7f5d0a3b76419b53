"""Estimators of the p-Laplace operator of a log density, from its score alone.

Brokman et al., "Identifying Memorization of Diffusion Models through p-Laplace Analysis", SSVM 2025 (arXiv 2505.08246).
For u = log p and the score s = grad u,

    Delta_p u = div(|s|^(p-2) s).

By the divergence theorem its mean over the ball of radius R round x in d dimensions is a flux through the sphere:

    mean over the ball of Delta_p u = d / R * E_n[ |s(x + R n)|^(p-2) s(x + R n) . n ],   n uniform on the unit sphere.

At p = 1 that is d / R times the mean cosine between score and outward normal: -d / R on a sharp peak.

Everything is computed in float32 whatever the score's dtype, and every estimate comes with its standard error.
Deviation from the public code: the power acts on |s|; there it acts on the cosine, so p = 2 returns the value of p = 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from memorization.models.probes import random_signs

Score = Callable[[Tensor], Tensor]  # scores of points (centres, points, *shape), row by row in the same shape


class Estimate(NamedTuple):
    """Values and their standard errors, both ``(powers, centres)``."""

    value: Tensor
    standard_error: Tensor


def random_directions(centres: Tensor, points: int, generator: torch.Generator) -> Tensor:
    """Independent unit vectors, uniform on the sphere: ``(points, *shape)``, the same for every centre."""
    noise = torch.randn(points, *centres.shape[1:], generator=generator)
    return (noise / noise.flatten(1).norm(dim=1).view(-1, *[1] * (noise.dim() - 1))).to(centres.device)


def random_offsets(centres: Tensor, radius: float, points: int, generator: torch.Generator) -> Tensor:
    """Independent points, uniform in the ball of ``radius`` round 0, as above."""
    lengths = radius * torch.rand(points, *[1] * (centres.dim() - 1), generator=generator) ** (1 / centres[0].numel())
    return random_directions(centres, points, generator) * lengths.to(centres.device)


def boundary(
    score: Score,
    centres: Tensor,
    radius: float,
    powers: Sequence[float] = (1.0,),
    *,
    points: int = 64,
    generator: torch.Generator,
    batch_size: int = 64,
) -> Estimate:
    """Means of Delta_p u over the balls of ``radius`` round ``centres``, by the flux through their spheres.

    Args:
        centres: ``(centres, *shape)``.
        powers: the p, each above 0; they share the scores.
        points: scores taken on each sphere.
        batch_size: points of a sphere that go to ``score`` at once, for all centres.
    """
    normals = random_directions(centres, points, generator)
    return _mean(boundary_samples(score, centres, radius, powers, normals, batch_size))


def boundary_samples(
    score: Score, centres: Tensor, radius: float, powers: Sequence[float], normals: Tensor, batch_size: int = 64
) -> Tensor:
    """What :func:`boundary` averages, ``(powers, centres, points)``, at unit vectors ``normals (points, *shape)``."""
    check_powers(powers)
    norms, dots = [], []
    for normal in normals.split(batch_size):
        scores = score(centres[:, None] + radius * normal).float().flatten(2)
        norms.append(scores.norm(dim=2))
        dots.append((scores * normal.flatten(1)).sum(2))
    norm, dot = torch.cat(norms, 1), torch.cat(dots, 1)
    return torch.stack([centres[0].numel() / radius * powered(norm, p - 2) * dot for p in powers])


def volume(
    score: Score,
    centres: Tensor,
    radius: float,
    powers: Sequence[float] = (1.0,),
    *,
    points: int = 64,
    generator: torch.Generator,
    step: float = 1e-3,
) -> Estimate:
    """The same means by central differences of |s|^(p-2) s at points inside the balls: 2 d scores a point.

    For low dimensions; ``step`` is the distance of the differences. It is also the shortest length over which a zero of
    the score is resolved, where Delta_p is singular for p < 2.
    """
    check_powers(powers)
    inside = centres[:, None] + random_offsets(centres, radius, points, generator)
    divergence = torch.zeros(())
    for axis in torch.eye(centres[0].numel(), device=centres.device).view(-1, *centres.shape[1:]):
        ahead, behind = (score(inside + sign * step * axis).float() for sign in (1, -1))
        along = [(s * axis).flatten(2).sum(2) for s in (ahead, behind)]
        norms = [s.flatten(2).norm(dim=2) for s in (ahead, behind)]
        flux = [torch.stack([powered(norm, p - 2) * s for p in powers]) for norm, s in zip(norms, along, strict=True)]
        divergence = divergence + (flux[0] - flux[1]) / (2 * step)
    return _mean(divergence)


def hutchinson(
    score: Score, centres: Tensor, radius: float, *, points: int = 64, generator: torch.Generator, batch_size: int = 64
) -> Estimate:
    """The same means at p = 2, where Delta_2 u is the trace of the score's Jacobian: E[v . J v], v of random signs.

    Each of the ``points`` lies at random in the ball and has a v of its own; one vector-Jacobian product each. With
    ``radius`` 0 it is Delta_2 u at the centres. Values are ``(1, centres)``.
    """
    offsets = random_offsets(centres, radius, points, generator)
    signs = random_signs(offsets.shape, generator).to(centres.device)
    traces = []
    for offset, sign in zip(offsets.split(batch_size), signs.split(batch_size), strict=True):
        with torch.enable_grad():
            inside = (centres[:, None] + offset).requires_grad_()
            (row,) = torch.autograd.grad((score(inside).float() * sign).sum(), inside)
        traces.append((row * sign).flatten(2).sum(2))
    return _mean(torch.cat(traces, 1)[None])


def powered(norm: Tensor, exponent: float) -> Tensor:
    """|s|^exponent, with 0 where s = 0: |s|^(p-2) s is 0 there for every p > 1, and has no direction for p = 1."""
    return torch.where(norm > 0, norm.clamp_min(torch.finfo(norm.dtype).tiny) ** exponent, 0.0)


def check_powers(powers: Sequence[float]) -> None:
    """Raise ``ValueError`` unless every p is above 0."""
    if not all(p > 0 for p in powers):
        raise ValueError(f"the p of the p-Laplace operator must be above 0, not {list(powers)}")


def _mean(samples: Tensor) -> Estimate:
    """Mean over the last axis and its standard error."""
    return Estimate(samples.mean(-1), samples.std(-1) / samples.shape[-1] ** 0.5)
