"""Detectors against the public code's numbers, closed forms and independent formulas."""

import json
from collections import defaultdict

import numpy as np
import pytest
import torch
from conftest import GOLDEN, load_tiny

from local_sd_pipeline import NoisePrediction
from memorization.detectors.anisotropy import Anisotropy
from memorization.detectors.base import DETECTORS, make_detectors
from memorization.detectors.fused import Fused
from memorization.detectors.noise_norm import NoiseNorm
from memorization.detectors.one_step import OneStepDenoising
from memorization.errors import InputError


def golden_cases():
    cases = defaultdict(list)
    for row in json.loads((GOLDEN / "anisotropy_official.json").read_text()):
        cases[row["model"], row["mode"], row["num_images"], row["seed"]].append(row)
    return cases


@pytest.mark.parametrize("case", golden_cases(), ids=str)
def test_official_variant_gives_the_public_codes_numbers(case):
    model, mode, num_images, seed = case
    rows = golden_cases()[case]
    pipe = load_tiny(model)
    grid = pipe.detection_timesteps(50)
    with torch.no_grad():
        embeds = pipe.embed([row["prompt"] for row in rows])
        trace = pipe.trace(embeds, pipe.pure_noise(num_images, seed), [grid[0], grid[-3]])
    values = Anisotropy(norm_weight=2, cosine_weight=3, cosine_mode=mode)(list(trace.values()))
    for term in ("norm", "cosine"):
        expected = torch.tensor([row[term] for row in rows])
        torch.testing.assert_close(values[term].mean(1), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(values["anisotropy"], 2 * values["norm"] + 3 * values["cosine"])


def point(kind="epsilon", t=981, seed=0, alpha=0.1):
    generator = torch.Generator().manual_seed(seed)
    latents, uncond = torch.randn(2, 2, 4, 5, 6, generator=generator)
    cond = torch.randn(3, 2, 4, 5, 6, generator=generator)
    return NoisePrediction(t, latents, uncond, cond, alpha, (1 - alpha**2) ** 0.5, kind)


def test_gaussian_closed_form():
    """Data N(mu_c, I) with the prompt, N(mu_u, I) without: eps = sigma (x - alpha mu) and so d."""
    alpha, sigma = 0.6, 0.8
    generator = torch.Generator().manual_seed(3)
    x, mu_u, mu_c = torch.randn(3, 1, 4, 8, 8, generator=generator)
    uncond, cond = sigma * (x - alpha * mu_u), sigma * (x - alpha * mu_c)[None]
    trace = NoisePrediction(1, x, uncond, cond, alpha, sigma, "epsilon")
    norm = sigma * alpha * (mu_u - mu_c).norm()
    torch.testing.assert_close(NoiseNorm()([trace])["noise_norm"], norm.reshape(1, 1))
    values = Anisotropy(variant="eps", cosine="vector")([trace, trace])
    left, right = (x - alpha * mu_u).flatten().numpy(), (mu_u - mu_c).flatten().numpy()
    cosine = left @ right / np.linalg.norm(left) / np.linalg.norm(right)
    assert values["norm"].item() == pytest.approx(norm.item(), rel=1e-5)
    assert values["cosine"].item() == pytest.approx(cosine, rel=1e-4)


@pytest.mark.parametrize("mode", ["x,c|x", "x,x|c", "x|c,c|x"])
@pytest.mark.parametrize("normalization", ["None", "L1", "L2"])
@pytest.mark.parametrize("cosine", ["pixel", "vector"])
def test_terms_by_independent_numpy(mode, normalization, cosine):
    high, low = point(t=981, seed=1), point(t=41, seed=2)
    values = Anisotropy(variant="eps", cosine_mode=mode, normalization=normalization, cosine=cosine)([high, low])

    def prepared(p, prompt, image):
        u, c = p.uncond[image].double().numpy(), p.cond[prompt, image].double().numpy()
        size = {"None": lambda v: 1.0, "L1": lambda v: np.abs(v).sum(), "L2": lambda v: np.sqrt((v**2).sum())}
        return u / size[normalization](u), c / size[normalization](c)

    for prompt in range(3):
        for image in range(2):
            u, c = prepared(high, prompt, image)
            assert values["norm"][prompt, image].item() == pytest.approx(np.sqrt(((c - u) ** 2).sum()), rel=1e-4)
            u, c = prepared(low, prompt, image)
            left, right = {"x,c|x": (u, c - u), "x,x|c": (u, c), "x|c,c|x": (c, c - u)}[mode]
            axis = 0 if cosine == "pixel" else None
            dot = (left * right).sum(axis) / np.sqrt((left**2).sum(axis) * (right**2).sum(axis))
            assert values["cosine"][prompt, image].item() == pytest.approx(np.mean(dot), rel=1e-4, abs=1e-6)


def test_normalization_acts():
    traces = [point(t=981, seed=1), point(t=41, seed=2)]
    norms = [Anisotropy(normalization=kind)(traces)["norm"] for kind in ("None", "L1", "L2")]
    assert len({round(norm[0, 0].item(), 6) for norm in norms}) == 3


def test_official_v_branch_is_the_formula_on_raw_outputs():
    high, low = point("v_prediction", seed=1), point("v_prediction", t=41, seed=2, alpha=0.99)
    official = Anisotropy()([high, low])
    corrected = Anisotropy(variant="eps")([high, low])
    # v_c - v_u = d / alpha, so (alpha / sigma^2) ||v_c - v_u|| = ||d|| / sigma^2.
    torch.testing.assert_close(official["norm"], corrected["norm"] / high.sigma**2)
    v_u, v_c = ((e - low.sigma * low.latents) / low.alpha for e in (low.uncond, low.cond))
    raw = torch.nn.functional.cosine_similarity(v_u.expand_as(v_c), v_c - v_u, dim=2).mean((2, 3))
    torch.testing.assert_close(official["cosine"], raw, rtol=1e-4, atol=1e-5)


def test_epsilon_checkpoint_sent_through_the_v_branch():
    """As the public code does with Realistic Vision: the v branch's factor on an epsilon model's outputs."""
    traces = [point(seed=1), point(t=41, seed=2)]
    plain, sent = Anisotropy()(traces), Anisotropy(branch="v")(traces)
    torch.testing.assert_close(sent["norm"], plain["norm"] * traces[0].alpha / traces[0].sigma ** 2)
    torch.testing.assert_close(sent["cosine"], plain["cosine"])


def test_epsilon_checkpoints_have_one_meaning():
    traces = [point(seed=1), point(t=41, seed=2)]
    for name, value in Anisotropy()(traces).items():
        torch.testing.assert_close(value, Anisotropy(variant="eps")(traces)[name])


def test_every_detector_gives_its_terms():
    for name, cls in DETECTORS.items():
        if cls.needs != "prompt":  # the others are called in test_trajectory.py
            continue
        detector = cls()
        values = detector([point(t=981, seed=1), point(t=41, seed=2)][: len(detector.steps)])
        assert tuple(values) == detector.terms and detector.terms[0] == name
        assert {value.shape for value in values.values()} == {(3, 2)}


def test_fused_is_the_norm_and_the_turn():
    generator = torch.Generator().manual_seed(0)
    cond, uncond, x = (torch.randn(*axes, 4, 3, 3, generator=generator) for axes in ((3, 2), (2,), (2,)))
    high, lower = (NoisePrediction(t, x, uncond, k * cond, 0.5, 0.5, "epsilon") for t, k in ((981, 1), (781, 2)))
    value = Fused(turn_weight=10.0)([high, lower])["fused"][1, 0].item()
    c, u = cond[1, 0].flatten().double(), uncond[0].flatten().double()
    turn = 1 - (c @ u / c.norm() / u.norm()).item()
    assert value == pytest.approx((c - u).norm().item() + 10 * turn, rel=1e-5)
    grid = load_tiny("tiny-eps").detection_timesteps()
    for cls, timesteps in ((Fused, [981, 781]), (Anisotropy, [981, 41]), (NoiseNorm, [981]), (OneStepDenoising, [981])):
        assert [grid[place] for place in cls.steps] == timesteps


def test_unknown_detector_names_the_known_ones():
    with pytest.raises(InputError, match=r"no_such.*anisotropy, noise_norm"):
        make_detectors(["anisotropy", "no_such"], {})
