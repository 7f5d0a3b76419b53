"""Detectors that look at how the noise prediction changes with its input, on linear models and on the tiny UNets."""

import pytest
import torch
from conftest import load_tiny

from local_sd_pipeline import NoisePrediction
from memorization.detectors.flipd import Flipd
from memorization.detectors.one_step import OneStepDenoising
from memorization.detectors.sharpness import Sharpness
from memorization.models.predictor import Predictor

ALPHA, SIGMA = 0.28, 0.96
SHAPE = (4, 3, 3)


def linear_model():
    """eps_c = A_k x for prompt k, eps_u = B x: ``predict`` and its trace on two noises."""
    generator = torch.Generator().manual_seed(0)
    d = 36
    a, b = torch.randn(3, d, d, generator=generator) / 6, torch.randn(d, d, generator=generator) / 6
    x = torch.randn(2, *SHAPE, generator=generator)

    def predict(latents, timestep, cond=True):
        flat = latents.flatten(2)
        return (torch.einsum("kij,knj->kni", a, flat) if cond else flat @ b.T).view_as(latents)

    xs = x.expand(3, -1, -1, -1, -1)
    trace = NoisePrediction(981, x, predict(xs, 981, False)[0], predict(xs, 981), ALPHA, SIGMA, "epsilon")
    return a, b, x, predict, [trace]


@pytest.mark.parametrize("method", ["exact", "difference"])
def test_sharpness_of_a_linear_model(method):
    """|| H_c v - H_u v || with H = -A / sigma: closed form."""
    a, b, x, predict, trace = linear_model()
    value = Sharpness(method)(trace, predict)["sharpness"]
    flat = x.flatten(1)
    for k in range(3):
        gap = (a[k] - b).double()
        expected = (flat.double() @ (gap @ gap).T).norm(dim=1) / SIGMA**2
        assert torch.allclose(value[k].double(), expected, rtol=1e-3)


def test_sharpness_by_both_methods_on_a_unet():
    pipe = load_tiny("tiny-eps")
    prompts, images = ["red kite", "two boats"], 2
    pipe.unet.to(memory_format=torch.contiguous_format)  # group norm has no forward derivative in channels_last
    embeds = pipe.embed(prompts)
    latents, predict = pipe.pure_noise(images, 5), Predictor(pipe, embeds, pipe.embed([""]), batch_size=3)
    with torch.no_grad():
        trace = [pipe.trace(embeds, latents, [981])[981]]
        exact, difference = (Sharpness(m)(trace, predict)["sharpness"] for m in ("exact", "difference"))
    assert torch.allclose(exact, difference, rtol=0.002)


def test_sharpness_of_a_blank_prompt_is_zero():
    _, _, _, _, trace = linear_model()
    trace = [trace[0]._replace(cond=trace[0].uncond.expand_as(trace[0].cond))]
    value = Sharpness()(trace, lambda latents, timestep, cond=True: latents)["sharpness"]
    assert value.abs().max() == 0


def test_dimension_of_a_linear_model():
    """FLIPD = d - sigma tr A + |A x|^2."""
    a, _, _, predict, trace = linear_model()
    value = Flipd(probes=4000, step=0.1)(trace, predict)["flipd"]
    expected = 36 - SIGMA * a.diagonal(dim1=1, dim2=2).sum(1)[:, None] + trace[0].cond.flatten(2).square().sum(2)
    assert torch.allclose(-value, expected, atol=0.6)


def test_one_step_denoising():
    """A model that predicts its input as noise makes of it x (1 - sigma) / alpha."""
    x = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0))
    trace = [NoisePrediction(981, x, x, x[None], ALPHA, SIGMA, "epsilon")]
    value = OneStepDenoising()(trace)["one_step"]
    factor = (1 - SIGMA) / ALPHA - 1
    assert torch.allclose(value[0], abs(factor) * x.flatten(1).square().mean(1).sqrt())
