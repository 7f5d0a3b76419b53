"""Pictures to latents and back, by a model's autoencoder."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from pathlib import Path
from weakref import WeakKeyDictionary

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor

from memorization.io.pictures import read_picture, to_bytes, to_tensor
from memorization.models.base import TextToImage
from memorization.models.finite import check_finite

_PRECISE: WeakKeyDictionary[AutoencoderKL, AutoencoderKL] = WeakKeyDictionary()


def precise(vae: AutoencoderKL) -> AutoencoderKL:
    """The autoencoder in a number format that holds its values: float32 where it says that float16 does not, as SDXL's.

    A copy, since the pipeline itself looks at what format its own is in; it is made once.
    """
    if vae.dtype != torch.float16 or not vae.config.get("force_upcast"):
        return vae
    if vae not in _PRECISE or _PRECISE[vae].device != vae.device:
        _PRECISE[vae] = copy.deepcopy(vae).float()
    return _PRECISE[vae]


def encode_pixels(vae: AutoencoderKL, pictures: Tensor) -> Tensor:
    """Scaled latents, float32, of pictures ``(n, 3, h, w)`` in [-1, 1]: the posterior's mean; differentiable."""
    vae = precise(vae)
    pixels = pictures.to(vae.device, vae.dtype)
    return (vae.encode(pixels).latent_dist.mean.float() - _shift(vae)) * vae.config["scaling_factor"]


@torch.no_grad()
def encode(pipe: TextToImage, paths: Sequence[str]) -> Tensor:
    """Scaled latents ``(pictures, c, h, w)``, float32, of pictures brought to the model's size; the posterior's mean.

    Raises:
        InputError: a file is no picture, or its latents are not finite.
    """
    height, width = (side * pipe.vae_scale_factor for side in pipe.pure_noise(1, 0).shape[2:])
    pictures = np.stack([read_picture(Path(path), (height, width)) for path in paths])
    latents = encode_pixels(pipe.vae, to_tensor(pictures))
    check_finite(latents, "the encoded picture", paths)
    return latents


def _shift(vae: AutoencoderKL) -> float:
    """What is taken off latents before they are scaled: 0 where an autoencoder says nothing."""
    return vae.config.get("shift_factor") or 0.0


def decode_pixels(pipe: TextToImage, latents: Tensor, at_once: int = 8) -> Tensor:
    """Pictures ``(rows, 3, h, w)`` about in [-1, 1], of scaled latents ``(rows, c, h, w)``; differentiable."""
    vae = precise(pipe.vae)
    chunks = (latents / vae.config["scaling_factor"] + _shift(vae)).to(vae.dtype).split(at_once)
    return torch.cat([vae.decode(chunk).sample.float() for chunk in chunks])


def decode(pipe: TextToImage, latents: Tensor, names: Sequence[str] = (), at_once: int = 8) -> Iterator[np.ndarray]:
    """Pictures, uint8 ``(h, w, 3)``, of scaled latents ``(rows, c, h, w)``.

    Args:
        names: of the rows, for a message.

    Raises:
        InputError: a picture is not finite; names its row.
    """
    for start in range(0, len(latents), at_once):
        pictures = decode_pixels(pipe, latents[start : start + at_once])
        check_finite(pictures, "the decoded picture", names[start : start + at_once])
        yield from to_bytes(pictures)
