"""Gradient descent on embeddings."""

import pytest
import torch
from conftest import load_tiny

from memorization.detectors.anisotropy import Anisotropy
from optim_utils import all_but_the_start_token, descend


def bowl(x, rows):
    return (x - rows.view(-1, 1).float()).square().sum(1)


def test_rows_go_each_to_its_own_minimum():
    found = descend(bowl, torch.full((3, 4), 5.0), lr=0.3, iterations=200)
    assert torch.allclose(found.best, torch.arange(3.0)[:, None].expand(3, 4), atol=0.05)
    assert found.losses.shape == (201, 3) and (found.steps == 200).all()


def test_rows_do_not_see_one_another():
    start = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    together = descend(bowl, start, target=0.5)
    alone = descend(lambda x, rows: bowl(x, rows + 2), start[2:], target=0.5)
    assert torch.equal(together.best[2], alone.best[0])


def test_a_row_stops_at_the_target_and_keeps_that_iterate():
    found = descend(bowl, torch.tensor([[3.0, 0], [0.1, 1.0]]), lr=0.1, iterations=100, target=0.25)
    final = bowl(found.best, torch.arange(2))
    assert (final <= 0.25).all() and final[0] > 0.15
    assert found.losses[found.steps[0], 0] == pytest.approx(final[0].item())
    assert found.steps[1] < found.steps[0] and found.losses[found.steps[1] + 1 :, 1].isnan().all()


def test_best_iterate_is_returned_where_the_last_is_worse():
    found = descend(bowl, torch.tensor([[0.05]]), lr=1.0, iterations=3)
    assert bowl(found.best, torch.tensor([0])).item() == found.losses.min().item()


def test_the_start_token_stays():
    start = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0))
    found = descend(lambda x, rows: x.square().flatten(1).sum(1), start, free=all_but_the_start_token(start))
    assert torch.equal(found.best[:, 0], start[:, 0]) and not torch.equal(found.best[:, 1], start[:, 1])


def test_the_gradient_of_a_detector_is_its_slope():
    """Anisotropy of a UNet along a random direction of the embedding: autograd against finite differences."""
    pipe = load_tiny("tiny-eps")
    grid = pipe.detection_timesteps()
    detector, latents = Anisotropy(1.0, 2.0), pipe.pure_noise(2, 0)
    timesteps = [grid[place] for place in detector.steps]
    embeds = pipe.embed(["red kite"])
    with torch.no_grad():
        uncond = pipe.predict_uncond(latents, timesteps)

    def score(e):
        trace = pipe.trace(e, latents, timesteps, uncond)
        return detector([trace[t] for t in timesteps])["anisotropy"].mean()

    way = torch.randn(embeds.shape, generator=torch.Generator().manual_seed(1))
    moved = embeds.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(score(moved), moved)
    h = 1e-2
    with torch.no_grad():
        slope = (score(embeds + h * way) - score(embeds - h * way)) / (2 * h)
    assert (gradient * way).sum().item() == pytest.approx(slope.item(), rel=1e-2)


def test_a_loss_that_is_not_finite_stops_the_descent():
    def broken(x, rows):
        return torch.where(rows == 1, torch.nan, x.square().sum(1))

    with pytest.raises(FloatingPointError, match="row 1 is not finite"):
        descend(broken, torch.ones(3, 2))
