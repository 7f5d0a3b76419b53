"""The p-Laplace operator on a mixture of Gaussians: ``python -m memorization.studies.gaussian_mixture``.

Brokman et al., SSVM 2025: three modes of covariance 0.1 I on an equilateral triangle of side 5, balls of radius 1.
Memorized data are sharp peaks of the density; there the operator is strongly negative, between the modes it is not. The
study estimates it at the peaks, the midpoints of the sides and the centre, for p = 1, 1.5, 2, 3, from the exact score
and from that of a small denoiser trained on samples, and compares with the closed form.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from tqdm import trange

from memorization.detectors.laplacian import Estimate, boundary, hutchinson, powered, volume
from memorization.flags import ArgumentParser, Arguments, run_script, value
from memorization.io.figures import save_figure
from memorization.io.files import write_atomically
from memorization.settings import Count

POWERS = (1.0, 1.5, 2.0, 3.0)
# At zeros of the score the volume estimator's variance is infinite for p <= 1.
SMOOTH = tuple(p for p in POWERS if p > 1)
RADIUS = 1.0
SIDE, VARIANCE = 5.0, 0.1
NOISE = 0.1  # standard deviation of the noise the denoiser takes away


@dataclass(frozen=True)
class Mixture:
    """Equal isotropic Gaussians.

    Args:
        means: ``(modes, d)``.
        variance: of every mode, along every axis.
    """

    means: Tensor
    variance: float

    def log_prob(self, x: Tensor) -> Tensor:
        """log p up to a constant, ``(..., d)`` -> ``(...)``."""
        return (-(x[..., None, :] - self.means).square().sum(-1) / (2 * self.variance)).logsumexp(-1)

    def _posterior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        pull = (self.means - x[..., None, :]) / self.variance  # the score of each mode
        return (-pull.square().sum(-1) * self.variance / 2).softmax(-1), pull

    def score(self, x: Tensor) -> Tensor:
        """grad log p, ``(..., d)``."""
        weights, pull = self._posterior(x)
        return (weights[..., None] * pull).sum(-2)

    def hessian(self, x: Tensor) -> Tensor:
        """Hessian of log p, ``(..., d, d)``: the spread of the modes' scores less the curvature of one mode."""
        weights, pull = self._posterior(x)
        apart = pull - self.score(x)[..., None, :]
        spread = torch.einsum("...k,...ki,...kj->...ij", weights, apart, apart)
        return spread - torch.eye(x.shape[-1], dtype=x.dtype) / self.variance

    def p_laplace(self, x: Tensor, powers: Sequence[float]) -> Tensor:
        """Delta_p log p = |s|^(p-2) (tr H + (p-2) s.H s / |s|^2), ``(powers, ...)``."""
        s, h = self.score(x), self.hessian(x)
        norm, trace = s.norm(dim=-1), h.diagonal(dim1=-2, dim2=-1).sum(-1)
        along = torch.einsum("...i,...ij,...j->...", s, h, s) * powered(norm, -2)
        return torch.stack([powered(norm, p - 2) * (trace + (p - 2) * along) for p in powers])

    def ball_mean(self, centres: Tensor, radius: float, powers: Sequence[float], angles: int = 20_000) -> Tensor:
        """The exact mean of Delta_p over balls in the plane, ``(powers, centres)``: the flux, by the trapezium rule."""
        turn = torch.arange(angles, dtype=torch.float64) * 2 * torch.pi / angles
        normal = torch.stack([turn.cos(), turn.sin()], -1)
        s = Mixture(self.means.double(), self.variance).score(centres[:, None].double() + radius * normal)
        norm, dot = s.norm(dim=-1), (s * normal).sum(-1)
        return torch.stack([2 / radius * (powered(norm, p - 2) * dot).mean(-1) for p in powers])

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """``(n, d)``."""
        modes = torch.randint(len(self.means), (n,), generator=generator)
        return self.means[modes] + self.variance**0.5 * torch.randn(n, self.means.shape[1], generator=generator)


def triangle(side: float = SIDE) -> Tensor:
    """Corners of an equilateral triangle round the origin, ``(3, 2)``."""
    turn = torch.arange(3) * 2 * torch.pi / 3 + torch.pi / 2
    return side / 3**0.5 * torch.stack([turn.cos(), turn.sin()], -1)


def places(means: Tensor) -> dict[str, Tensor]:
    """Where the operator is looked at."""
    return {"peak": means, "midpoint": (means + means.roll(1, 0)) / 2, "centre": means.mean(0, keepdim=True)}


def train_denoiser(mixture: Mixture, noise: float, steps: int, seed: int = 0, progress: bool = True) -> nn.Module:
    """A small network that predicts the noise in samples of ``mixture`` plus ``noise`` times N(0, I)."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(2, 128), nn.SiLU(), nn.Linear(128, 128), nn.SiLU(), nn.Linear(128, 2))
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in trange(steps, desc="denoiser", disable=not progress):
        eps = torch.randn(1024, 2, generator=generator)
        loss = (net(mixture.sample(len(eps), generator) + noise * eps) - eps).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return net.requires_grad_(False)


def estimates(mixture: Mixture, score, centres: Tensor, points: int) -> dict[str, tuple[Sequence[float], Estimate]]:
    """Every estimator at ``centres``: name -> (its powers, its estimate)."""

    def generator() -> torch.Generator:
        return torch.Generator().manual_seed(0)

    common = dict(points=points, batch_size=points)
    return {
        "boundary": (POWERS, boundary(score, centres, RADIUS, POWERS, **common, generator=generator())),
        "volume": (SMOOTH, volume(score, centres, RADIUS, SMOOTH, points=points, generator=generator())),
        "Hutchinson": ((2.0,), hutchinson(score, centres, RADIUS, **common, generator=generator())),
    }


def study(mixture: Mixture, scores: dict, points: int) -> pd.DataFrame:
    """A row for each score, place, estimator and p: value, standard error, exact value (averages over equal places)."""
    rows = []
    for score_name, score in scores.items():
        for place, centres in places(mixture.means).items():
            exact = dict(zip(POWERS, mixture.ball_mean(centres, RADIUS, POWERS).mean(1).tolist(), strict=True))
            for name, (powers, estimate) in estimates(mixture, score, centres, points).items():
                values, errors = estimate.value.mean(1).tolist(), estimate.standard_error.mean(1).tolist()
                rows += [
                    {"score": score_name, "place": place, "estimator": name, "p": p,
                     "value": value, "standard_error": error, "exact": exact[p]}
                    for p, value, error in zip(powers, values, errors, strict=True)
                ]  # fmt: skip
    return pd.DataFrame(rows)


def draw(mixture: Mixture, scores: dict, path: Path) -> None:
    """Maps of the boundary estimate over the plane, a column a p, a row a score."""
    axis = torch.linspace(-4.5, 4.5, 91)
    grid = torch.cartesian_prod(axis, axis)
    figure, axes = plt.subplots(len(scores), len(POWERS), figsize=(3.1 * len(POWERS), 2.9 * len(scores)))
    for row, (name, score) in zip(axes, scores.items(), strict=True):
        flux = boundary(score, grid, RADIUS, POWERS, points=128, generator=torch.Generator().manual_seed(0)).value
        for axis_, p, values in zip(row, POWERS, flux, strict=True):
            image = values.view(len(axis), -1).T.numpy()
            limit = np.abs(image).max()
            shown = axis_.imshow(image, origin="lower", extent=(-4.5, 4.5) * 2, cmap="RdBu", vmin=-limit, vmax=limit)
            axis_.plot(*mixture.means.T.numpy(), "k+", markersize=7)
            axis_.set_title(f"{name}, p = {p:g}", fontsize=9)
            axis_.tick_params(labelsize=7)
            figure.colorbar(shown, ax=axis_, fraction=0.046, pad=0.03).ax.tick_params(labelsize=7)
    save_figure(figure, path)


def main(arguments: Arguments = None) -> None:
    parser = ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--points", type=value(Count), default=4096, help="of each ball (default: %(default)s)")
    add("--train-steps", type=value(Count), default=4000, help="of the denoiser (default: %(default)s)")
    add("--out", type=Path, default=Path("results/studies/gaussian_mixture"), help="default: %(default)s")
    args = parser.parse_args(arguments)
    if args.points < 2 or args.train_steps < 1:
        parser.error("--points is at least 2, --train-steps at least 1")
    noised = Mixture(triangle(), VARIANCE)  # the density under study, whose score the denoiser learns
    net = train_denoiser(Mixture(noised.means, VARIANCE - NOISE**2), NOISE, args.train_steps)
    scores = {"exact": noised.score, "denoiser": lambda x: -net(x) / NOISE}
    table = study(noised, scores, args.points)
    shown = table.round(3).to_string(index=False)
    print(shown)
    draw(noised, scores, args.out / "maps.png")
    write_atomically(args.out / "table.csv", table.round(5).to_csv(index=False))
    print(f"{args.out}/table.csv, {args.out}/maps.png")


if __name__ == "__main__":
    run_script(main)
