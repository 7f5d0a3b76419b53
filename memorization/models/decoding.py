"""Pictures to latents and back, by a model's autoencoder."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor

from local_sd_pipeline import LocalStableDiffusionPipeline
from memorization.io.pictures import read_picture, to_bytes, to_tensor


def encode_pixels(vae: AutoencoderKL, pictures: Tensor) -> Tensor:
    """Scaled latents, float32, of pictures ``(n, 3, h, w)`` in [-1, 1]: the posterior's mean; differentiable."""
    pixels = pictures.to(vae.device, vae.dtype)
    return vae.encode(pixels).latent_dist.mean.float() * vae.config["scaling_factor"]


@torch.no_grad()
def encode(pipe: LocalStableDiffusionPipeline, paths: Sequence[str]) -> Tensor:
    """Scaled latents ``(pictures, c, h, w)``, float32, of pictures brought to the model's size; the posterior's mean.

    Raises:
        InputError: a file is no picture.
    """
    size = pipe.unet.config.sample_size
    height, width = (side * pipe.vae_scale_factor for side in ((size, size) if isinstance(size, int) else size))
    pictures = np.stack([read_picture(Path(path), (height, width)) for path in paths])
    return encode_pixels(pipe.vae, to_tensor(pictures))


def decode_pixels(pipe: LocalStableDiffusionPipeline, latents: Tensor, at_once: int = 8) -> Tensor:
    """Pictures ``(rows, 3, h, w)`` about in [-1, 1], of scaled latents ``(rows, c, h, w)``; differentiable."""
    chunks = (latents / pipe.vae.config.scaling_factor).to(pipe.vae.dtype).split(at_once)
    return torch.cat([pipe.vae.decode(chunk).sample.float() for chunk in chunks])


def decode(pipe: LocalStableDiffusionPipeline, latents: Tensor, at_once: int = 8) -> Iterator[np.ndarray]:
    """Pictures, uint8 ``(h, w, 3)``, of scaled latents ``(rows, c, h, w)``."""
    for chunk in latents.split(at_once):
        yield from to_bytes(decode_pixels(pipe, chunk))
