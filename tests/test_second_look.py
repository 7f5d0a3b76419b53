"""The second look against numpy on a linear model, its price, and its place in a run."""

import numpy as np
import pytest
import torch
from conftest import load_tiny

from local_sd_pipeline import NoisePrediction
from memorization.detectors.base import make_detectors
from memorization.detectors.second_look import SecondLook
from memorization.models.predictor import Predictor
from memorization.runs.costs import measure_costs
from memorization.runs.scorer import Scorer, SequentialScorer

ALPHA, SIGMA = 0.28, 0.96
LOWER = {401: (0.6, 0.8), 41: (0.96, 0.28)}
SHAPE = (4, 4, 3)


class Linear:
    """eps_c = A_k x for prompt k and eps_u = B x at the first step; both times (1 + t / 1000) at the second."""

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        self.a = torch.randn(3, 48, 48, generator=generator) / 7
        self.b = torch.randn(48, 48, generator=generator) / 7

    def noise_scales(self, timestep):
        return LOWER[timestep]

    def __call__(self, latents, timestep, cond=True):
        flat = latents.flatten(2)
        eps = torch.einsum("kij,knj->kni", self.a, flat) if cond else flat @ self.b.T
        return ((1 + timestep / 1000) * eps).view_as(latents)

    raw = __call__

    def trace(self, x):
        xs = x.expand(3, -1, -1, -1, -1)
        uncond, cond = (self(xs, 0, half) for half in (False, True))
        return [NoisePrediction(981, x, uncond[0], cond, ALPHA, SIGMA, "epsilon")]


@pytest.mark.parametrize("t", list(LOWER))
@pytest.mark.parametrize("cosine", ["pixel", "vector"])
def test_it_is_the_formula_on_a_linear_model(t, cosine):
    model, x = Linear(), torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(1))
    detector = SecondLook(2.0, -3.0, timestep=t, guidance=1.5, cosine=cosine, seed=5)
    values = detector(model.trace(x), model)
    z = torch.randn(SHAPE, generator=torch.Generator().manual_seed(2**63 + 5)).double().numpy().ravel()
    alpha, sigma = LOWER[t]
    b = model.b.double().numpy()
    for k in range(3):
        a = model.a[k].double().numpy()
        for n in range(2):
            start = x[n].double().numpy().ravel()
            clean = (start - SIGMA * (b @ start + 1.5 * (a @ start - b @ start))) / ALPHA
            y = alpha * clean + sigma * z
            d, u = (1 + t / 1000) * (a - b) @ y, (1 + t / 1000) * b @ y
            norm = np.sqrt((d**2).sum())
            if cosine == "pixel":
                d, u = d.reshape(SHAPE), u.reshape(SHAPE)
            angle = np.mean((d * u).sum(0) / np.sqrt((d**2).sum(0) * (u**2).sum(0)))
            assert values["second_norm"][k, n].item() == pytest.approx(norm, rel=1e-4)
            assert values["second_cosine"][k, n].item() == pytest.approx(angle, rel=1e-3, abs=1e-5)
            assert values["second_look"][k, n].item() == pytest.approx(2 * norm - 3 * angle, rel=1e-4)


def test_it_costs_four_evaluations_the_shared_one_among_them():
    pipe = load_tiny("tiny-eps")
    costs = measure_costs(pipe, make_detectors(["second_look"]), ["red kite"], steps=50, batch_size=8)
    assert costs["second_look"]["evaluations"] == 3  # and the unconditional one on pure noise, once a run


def test_it_runs_in_half_precision_and_a_blank_prompt_has_no_pull():
    scorer = Scorer(load_tiny("tiny-v", "bfloat16"), [SecondLook()], noises=1, seed=3, steps=50, batch_size=4)
    red, blank = scorer(["red kite", ""])
    assert red["second_look"][0] > 0 and blank["second_look"] == blank["second_cosine"] == [0]


def test_a_noise_has_its_value_whatever_comes_before_it():
    pipe = load_tiny("tiny-eps")
    settings = {"seed": 3, "steps": 50, "batch_size": 8}
    both = Scorer(pipe, [SecondLook()], noises=2, **settings)(["red kite"])[0]["second_look"]
    bands = {1: (-np.inf, np.inf), 2: (0, 0), 4: (0, 0)}  # asks for a second noise, and for no third
    sequential = SequentialScorer(pipe, [SecondLook()], detector="second_look", bands=bands, **settings)
    assert sequential(["red kite"])[0]["second_look"] == pytest.approx(both, rel=1e-4)


def test_its_gradient_reaches_the_embedding():
    pipe = load_tiny("tiny-eps")
    with torch.no_grad():
        embeds, empty, latents = pipe.embed(["red kite"]), pipe.embed([""]), pipe.pure_noise(1, 3)

    def score(embeds):
        trace = [pipe.trace(embeds, latents, [981])[981]]
        return SecondLook(1.0, 5.0)(trace, Predictor(pipe, embeds, empty, 4))["second_look"].sum()

    moving = embeds.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(score(moving), moving)
    step = 1e-2 * gradient / gradient.norm()
    with torch.no_grad():
        slope = (score(embeds + step) - score(embeds - step)).item() / 2e-2
    assert slope == pytest.approx(gradient.norm().item(), rel=0.02)
