"""Token significance and costs."""

import pytest
import torch
from conftest import load_tiny

from memorization.detectors.base import make_detectors
from memorization.detectors.explain import as_text, draw_significance, token_significance
from memorization.runs.costs import measure_costs


def explain(pipe, latents):
    t = pipe.detection_timesteps()[0]
    with torch.no_grad():
        uncond = pipe.predict_uncond(latents, [t]).eps[t]
    return token_significance(pipe, "red kite", latents, t, uncond)


def test_significance_is_the_slope_of_the_norm():
    """Moving one token's embedding along its gradient changes the norm by significance times the way."""
    pipe = load_tiny("tiny-eps")
    latents, t = pipe.pure_noise(2, 0), pipe.detection_timesteps()[0]
    explained = explain(pipe, latents)
    embeds = pipe.embed(["red kite"])

    def norm(e):
        trace = pipe.trace(e, latents, [t])[t]
        return trace.guidance.flatten(2).norm(dim=2).mean().item()

    place, h = 1, 1e-2  # the first token stands behind the start token
    slopes = []
    with torch.no_grad():
        for axis in range(embeds.shape[-1]):
            moved = [embeds.clone(), embeds.clone()]
            for e, sign in zip(moved, (1, -1), strict=True):
                e[0, place, axis] += sign * h
            slopes.append((norm(moved[0]) - norm(moved[1])) / (2 * h))
    assert torch.tensor(slopes).norm().item() == pytest.approx(explained.values[0].item(), rel=1e-2)
    assert len(explained.tokens) == len(explained.values)


def test_explanation_is_shown(tmp_path):
    pipe = load_tiny("tiny-eps")
    explained = explain(pipe, pipe.pure_noise(1, 0))
    assert as_text(explained).count("%") == min(3, len(explained.tokens))
    assert draw_significance([explained, explained], tmp_path / "tokens.png").stat().st_size > 1000


def test_costs_are_counted():
    """Two rows a prompt for the trace of two timesteps, two rows a step for a generation, and nothing twice; of a
    generation, the steps that are read."""
    pipe = load_tiny("tiny-eps", pictures=True)
    detectors = make_detectors(
        ["anisotropy", "noise_norm", "sharpness", "trajectory_norm", "transition_norm", "attention_entropy",
         "trajectory_z", "guidance_flux", "flipd"],
        {"trajectory_z": {"every": 3}, "guidance_flux": {"every": 4}},
    )  # fmt: skip
    costs = measure_costs(pipe, detectors, ["red kite", "two boats"], steps=6, batch_size=4)
    evaluations = {name: cost["evaluations"] for name, cost in costs.items()}
    assert evaluations == {
        "anisotropy": 2, "noise_norm": 1, "sharpness": 5, "trajectory_norm": 12, "trajectory_norm_5": 10,
        "trajectory_norm_1": 2, "transition_norm": 12, "attention_entropy": 12, "layer_entropy": 2,
        "trajectory_z": 2 * 4, "guidance_flux": 2 * 5 + 2 * 2 * 2, "flipd": 12 + 1 + 2 * 2,
        "all": 2 + 4 + 12 + 8 + 5,
    }  # fmt: skip
    assert all(cost["seconds"] > 0 for cost in costs.values())
