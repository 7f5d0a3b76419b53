"""Nearness of pictures."""

import numpy as np
import pytest
import torch

from memorization.errors import InputError
from memorization.similarity import sscd
from memorization.similarity.pixel import l2, normalized_l2


def test_normalized_l2_by_hand():
    generator = torch.Generator().manual_seed(0)
    training = torch.rand(60, 3, 8, 8, generator=generator) * 2 - 1
    picture = torch.rand(1, 3, 8, 8, generator=generator) * 2 - 1
    distances = (training - picture).numpy().reshape(60, -1)
    distances = np.sqrt((distances**2).mean(axis=1)) / 2
    np.testing.assert_allclose(l2(picture, training)[0], distances, rtol=1e-5)
    expected = distances / (0.5 * np.sort(distances)[:50].mean())
    np.testing.assert_allclose(normalized_l2(picture, training)[0], expected, rtol=1e-5)


def test_exact_copy_is_zero_and_others_are_about_two():
    training = torch.randn(80, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    distance = normalized_l2(training[:2], training)
    assert distance[0, 0] < 1e-6 and 1.8 < distance[0, 1:].mean() < 2.3


def test_sscd_says_how_to_get_its_weights(monkeypatch):
    monkeypatch.setenv("SSCD_ONNX", "/nowhere.onnx")
    with pytest.raises(InputError, match="onnxruntime"):
        sscd.SSCD()
