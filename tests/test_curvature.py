"""Detectors that look at how the noise prediction changes with its input, on linear models and on the tiny UNets."""

from types import SimpleNamespace

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

    predict.raw = predict
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
    same = SimpleNamespace(raw=lambda latents, timestep, cond=True: latents)
    value = Sharpness()(trace, same)["sharpness"]
    assert value.abs().max() == 0


class PredictorOf:
    """A model whose eps under a prompt at t = 70, where alpha = .8 and sigma = .6, is a function of the latents."""

    def __init__(self, eps):
        self.eps = eps

    def __call__(self, latents, timestep, cond=True):
        assert timestep == 70 and cond
        return self.eps(latents)

    def noise_scales(self, timestep):
        return 0.8, 0.6


def test_dimension_of_a_linear_model():
    """FLIPD = d - sigma tr A + |A alpha x_0|^2."""
    a = linear_model()[0]
    clean = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(1))
    linear = PredictorOf(lambda x: torch.einsum("kij,knj->kni", a, x.flatten(2)).view_as(x))
    value = Flipd(timestep=70, probes=4000, step=0.1)(clean, linear)["flipd"]
    norm = torch.einsum("kij,kj->ki", a, 0.8 * clean.flatten(1)).square().sum(1)
    expected = 36 - 0.6 * a.diagonal(dim1=1, dim2=2).sum(1) + norm
    assert value.shape == (3,) and torch.allclose(-value, expected, atol=0.6)


def test_dimension_of_a_sharp_peak_is_zero_and_of_a_broad_one_all():
    """Data N(x_0, v I): eps = sigma (x - alpha x_0) / w, w = alpha^2 v + sigma^2; at x_0 FLIPD = d - sigma^2 d / w."""
    clean = torch.randn(1, *SHAPE, generator=torch.Generator().manual_seed(1))
    for v, expected in ((0.0, 0.0), (0.5, 36 * 0.32 / 0.68), (1e6, 36.0)):
        predict = PredictorOf(lambda x, v=v: 0.6 * (x - 0.8 * clean[:, None]) / (0.64 * v + 0.36))
        assert -Flipd(timestep=70)(clean, predict)["flipd"].item() == pytest.approx(expected, abs=1e-2)


def test_one_step_denoising():
    """One step of a sampler whose start latent is sigma_max times the noise: x - sigma_max eps, on whatever eps."""
    generator = torch.Generator().manual_seed(0)
    x, eps = torch.randn(2, *SHAPE, generator=generator), torch.randn(3, 2, *SHAPE, generator=generator)
    value = OneStepDenoising()([NoisePrediction(981, x, x, eps, ALPHA, SIGMA, "epsilon")])["one_step"]
    start = SIGMA / ALPHA * x
    x0 = start - SIGMA / ALPHA * eps
    assert torch.allclose(value, (x0 - start).square().flatten(2).mean(2), rtol=1e-4)
    assert value[1, 0].item() == pytest.approx((SIGMA / ALPHA) ** 2 * eps[1, 0].square().mean().item(), rel=1e-5)
