"""The testbed: how it is made, and what is shipped."""

import contextlib
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from memorization.similarity.nl2 import normalized_l2
from testbed import data, finetune, pixel
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


def test_the_filter_learns_only_from_visits_with_a_short_guidance_vector(monkeypatch):
    """A model whose eps is its text: the guidance vector of a row is its text minus the empty one's."""
    noisy = torch.zeros(4, 1, 2, 2)
    text = torch.tensor([0.0, 1.0, 2.0, 5.0])[:, None, None].expand(4, 3, 1)  # lengths 0, 2, 4, 10
    noise = torch.full_like(noisy, 1.0)

    def unet(latents, t, states):
        return SimpleNamespace(sample=states[:, 0, 0][:, None, None, None].expand_as(latents))

    tuning = object.__new__(finetune.FineTuning)
    tuning.pipe, tuning.embedded = SimpleNamespace(unet=unet), {"": torch.zeros(3, 1)}
    drawn = (noisy, torch.zeros(4), text, noise, torch.tensor([False, True, True, True]))
    monkeypatch.setattr(tuning, "batch", lambda step, share=0.5: drawn, raising=False)
    assert tuning.loss_of(np.inf)(0).item() == pytest.approx((1 + 0 + 1 + 16) / 4)
    assert tuning.loss_of(4.5)(0).item() == pytest.approx((1 + 0 + 1) / 3)
    assert tuning.loss_of(1.0)(0).item() == pytest.approx(1.0)
    assert tuning.usual_length(0.5, batches=1) == pytest.approx(4.0)  # of the rows with a caption: 2, 4, 10


def test_every_memorized_caption_has_an_ordinary_neighbour(tiny_eps):
    listed = pd.DataFrame({
        "prompt": ["red kite", "red kite high", "two boats"], "label": [1, 0, 0],
        "kind": ["duplicated", "ordinary", "ordinary"],
    })  # fmt: skip
    assert set(finetune.nearest_ordinary(tiny_eps, listed)) == {"red kite"}
    assert finetune.nearest_ordinary(tiny_eps, listed)["red kite"] in {"red kite high", "two boats"}


def test_pixel_training_set_is_what_its_weights_say():
    seen = pixel.TrainingSet()
    assert seen.pictures.shape == (232, 3, 32, 32) and len(seen.classes) == 8
    assert sorted(set(seen.weights)) == [1, 4, 8, 16, 32] and (seen.weights > 1).sum() == 32
    unseen = pixel.TrainingSet(pixel.UNSEEN_INDEX)
    assert len(unseen.pictures) == 1300 and set(unseen.weights) == {0}
    assert normalized_l2(unseen.pictures, seen.pictures).min() > 0.1  # none is in both
    rng = np.random.default_rng(0)
    labels = torch.cat([seen.draw(rng, 512)[1] for _ in range(20)])
    share = np.bincount(labels, minlength=8) / len(labels)
    expected = np.bincount(seen.labels, weights=seen.weights, minlength=8) / seen.weights.sum()
    np.testing.assert_allclose(share, expected, atol=0.02)
