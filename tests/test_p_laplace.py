"""The p-Laplace estimators against closed forms."""

import pytest
import torch

from memorization.detectors.laplacian import boundary, hutchinson, volume
from memorization.studies.gaussian_mixture import Mixture, places, train_denoiser, triangle

POWERS = (0.5, 1.0, 1.5, 2.0, 3.0)


def generator():
    return torch.Generator().manual_seed(0)


def within(estimate, exact, errors=4.0):
    gap = (estimate.value - exact).abs()
    return (gap <= errors * estimate.standard_error + 1e-3 * exact.abs().clamp_min(1e-2)).all()


@pytest.mark.parametrize("d", [2, 5, 64])
def test_boundary_on_a_gaussian(d):
    """Ball round the mean of N(0, v I): the mean is -d R^(p-2) / v^(p-1), with no variance; for any p and d."""
    v, r = 0.3, 0.7
    estimate = boundary(lambda x: -x / v, torch.zeros(1, d), r, POWERS, points=8, generator=generator())
    for p, value, error in zip(POWERS, estimate.value, estimate.standard_error, strict=True):
        assert value.item() == pytest.approx(-d * r ** (p - 2) / v ** (p - 1), rel=1e-4)
        assert error.item() == pytest.approx(0, abs=1e-2)


def test_p2_on_an_anisotropic_gaussian_is_minus_the_trace_of_the_precision():
    precision = torch.tensor([1.0, 4.0, 9.0])
    centres = torch.tensor([[0.0, 0, 0], [1, -2, 0.5]])
    exact = -precision.sum() * torch.ones(1, 2)
    common = dict(points=4000, generator=generator())
    assert within(boundary(lambda x: -precision * x, centres, 0.5, [2.0], **common), exact)
    assert within(volume(lambda x: -precision * x, centres, 0.5, [2.0], **common), exact)
    for radius in (0.0, 0.5):
        assert within(hutchinson(lambda x: -precision * x, centres, radius, points=32, generator=generator()), exact)


def test_every_estimator_on_the_mixture():
    mixture = Mixture(triangle(), 0.1)
    centres = torch.cat(list(places(mixture.means).values()))
    exact = mixture.ball_mean(centres, 1.0, POWERS).float()
    common = dict(points=8000, generator=generator())
    assert within(boundary(mixture.score, centres, 1.0, POWERS, **common), exact)
    smooth = [p for p in POWERS if p > 1]  # the volume integrand of p <= 1 has infinite variance at zeros of the score
    assert within(volume(mixture.score, centres, 1.0, smooth, **common), exact[[POWERS.index(p) for p in smooth]])
    assert within(hutchinson(mixture.score, centres, 1.0, batch_size=8000, **common), exact[[POWERS.index(2.0)]])
    p1 = exact[POWERS.index(1.0)]
    assert p1[:3].max() < -1.9 and p1[3:].min() > p1[:3].max() + 1  # sharp peaks stand out, bounded by -d / R


def test_closed_form_of_the_operator_agrees_with_the_flux_of_a_small_ball():
    mixture = Mixture(triangle().double(), 0.5)
    x = torch.tensor([[0.7, 0.2], [-1.0, 1.5]], dtype=torch.float64)
    assert torch.allclose(mixture.p_laplace(x, POWERS), mixture.ball_mean(x, 1e-3, POWERS), rtol=1e-3)
    grad = torch.autograd.functional.jacobian(lambda y: mixture.log_prob(y).sum(), x)
    assert torch.allclose(mixture.score(x), grad)


def test_estimates_do_not_depend_on_batches_and_follow_the_seed():
    mixture, centres = Mixture(triangle(), 0.1), torch.tensor([[0.9, 0.4], [0.0, 1.0]])
    first, second = (
        boundary(mixture.score, centres, 1.0, [1.0], points=50, generator=generator(), batch_size=b) for b in (50, 7)
    )
    assert torch.allclose(first.value, second.value)
    other = boundary(mixture.score, centres, 1.0, [1.0], points=50, generator=torch.Generator().manual_seed(1))
    assert not torch.allclose(first.value, other.value, atol=1e-6)


def test_standard_error_is_the_spread_over_seeds():
    mixture, centre = Mixture(triangle(), 0.1), torch.tensor([[0.9, 0.4]])
    runs = [
        boundary(mixture.score, centre, 1.0, [1.0, 3.0], points=64, generator=torch.Generator().manual_seed(i))
        for i in range(300)
    ]
    spread = torch.stack([run.value for run in runs]).std(0)
    claimed = torch.stack([run.standard_error for run in runs]).mean(0)
    assert torch.allclose(spread, claimed, rtol=0.15)


def test_p_must_be_positive():
    with pytest.raises(ValueError, match="above 0"):
        boundary(lambda x: x, torch.zeros(1, 2), 1.0, [0.0], generator=generator())


def test_denoiser_learns_the_score():
    mixture = Mixture(triangle(), 0.1)
    net = train_denoiser(mixture, 0.3, 800, progress=False)
    x = mixture.sample(500, generator()) + 0.3 * torch.randn(500, 2, generator=generator())
    exact = Mixture(mixture.means, 0.1 + 0.09).score(x)
    assert (-net(x) / 0.3 - exact).square().mean() < 0.1 * exact.square().mean()
