"""The testbed: how it is made, and what is shipped."""

import contextlib

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from testbed import data
from testbed.fit import fit, learning_rate


def table(size=1100):
    names = [f"thing {i}" for i in range(size)] + ["man running", "woman running", "person running facing right"]
    return pd.DataFrame({"name": names, "family": [data.family(name) for name in names]})


def test_families_join_near_copies():
    assert data.family("man running") == data.family("woman running") == data.family("person running facing right")
    assert data.family("cat face") == data.family("cat") != data.family("black cat")


def test_captions_keep_families_together_and_are_seeded():
    captions = data.make_captions(table(), seed=0)
    assert captions.equals(data.make_captions(table(), seed=0))
    assert not captions["prompt"].equals(data.make_captions(table(), seed=1)["prompt"])
    assert (captions.groupby("family")[["kind", "duplicates"]].nunique() == 1).all(axis=None)
    counts = captions.groupby(["kind", "duplicates"]).size()
    assert all(counts["duplicated", level] == data.PER_LEVEL for level in data.LEVELS)
    assert counts["ordinary", data.ORDINARY_WEIGHT] == data.ORDINARY and counts["held-out", 0] == data.HELD_OUT


def test_fixed_scene_is_fixed_and_others_are_fresh():
    sprite = Image.new("RGBA", (data.SPRITE, data.SPRITE), (255, 0, 0, 255))
    first = data.fixed_scene(sprite, "cat", seed=0)
    assert first.shape == (data.SIZE, data.SIZE, 3) and first.dtype == np.uint8
    assert np.array_equal(first, data.fixed_scene(sprite, "cat", seed=0))
    assert not np.array_equal(first, data.fixed_scene(sprite, "dog", seed=0))
    rng = np.random.default_rng(0)
    assert not np.array_equal(data.scene(sprite, rng), data.scene(sprite, rng))


def test_learning_rate_rises_and_falls():
    rates = [learning_rate(step, 1000, 1.0) for step in range(1000)]
    assert np.argmax(rates) in (39, 40) and max(rates) == 1.0 and rates[0] < 0.03 and rates[-1] < 0.02


def test_training_by_another_recipe_is_not_gone_on_with(tmp_path):
    def train(recipe):
        model = torch.nn.Linear(1, 1)
        fit(
            model,
            lambda step: model(torch.ones(1, 1)).square().mean(),
            steps=200,
            peak=0.01,
            folder=tmp_path,
            recipe=recipe,
        )

    train("one")
    with pytest.raises(SystemExit, match="another recipe"):
        train("two")


def test_interrupted_training_goes_on_to_the_same_weights(tmp_path):
    def train(folder, stop=None):
        torch.manual_seed(0)
        model = torch.nn.Linear(3, 1)

        def loss_of(step):
            if step == stop:
                raise InterruptedError
            x = torch.randn(8, 3, generator=torch.Generator().manual_seed(step))
            return (model(x) - x.sum(1, keepdim=True)).square().mean()

        fit(model, loss_of, steps=450, peak=1e-2, folder=folder)
        return model

    whole = train(tmp_path / "whole")
    with contextlib.suppress(InterruptedError):
        train(tmp_path / "cut", stop=321)
    resumed = train(tmp_path / "cut")
    assert torch.equal(whole.weight, resumed.weight) and torch.equal(whole.bias, resumed.bias)
    torch.testing.assert_close(whole.weight, torch.ones(1, 3), rtol=0, atol=0.02)
