"""Pictures as files, as bytes ``(n, h, w, 3)`` and as tensors ``(n, 3, h, w)`` in [-1, 1]."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor

from memorization.errors import InputError


def read_picture(path: Path, size: tuple[int, int] | None) -> np.ndarray:
    """uint8 ``(h, w, 3)``, brought to ``size`` (height, width) if given.

    Raises:
        InputError: the file is no picture.
    """
    try:
        picture = Image.open(path).convert("RGB")
        return np.asarray(picture.resize(size[::-1], Image.Resampling.LANCZOS) if size else picture)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(f"{path}: no picture that can be read ({error})") from None


def to_tensor(pictures: np.ndarray) -> Tensor:
    """uint8 ``(n, h, w, 3)`` -> float ``(n, 3, h, w)`` in [-1, 1]."""
    return torch.from_numpy(np.array(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1


def to_bytes(pictures: Tensor) -> np.ndarray:
    """uint8 ``(n, h, w, 3)`` of pictures ``(n, 3, h, w)``; what lies outside [-1, 1] is clipped."""
    return ((pictures / 2 + 0.5).clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def encode_pixels(vae: AutoencoderKL, pictures: Tensor) -> Tensor:
    """Scaled latents, float32, of pictures ``(n, 3, h, w)`` in [-1, 1]: the posterior's mean; differentiable."""
    pixels = pictures.to(vae.device, vae.dtype)
    return vae.encode(pixels).latent_dist.mean.float() * vae.config.scaling_factor
