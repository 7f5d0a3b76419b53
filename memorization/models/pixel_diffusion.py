"""Pixel-space diffusion models (DDPMs), unconditional and class-conditional: loading and sampling.

Any checkpoint in diffusers' DDPM format, in safetensors: the shipped ones (testbed/models/pixel-uncond, pixel-class),
or google/ddpm-cifar10-32 from the hub.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler
from torch import Tensor

from local_sd_pipeline import NoisePrediction
from memorization.errors import InputError
from memorization.models.generation import Guide

SAMPLERS = {"ddim": DDIMScheduler, "ddpm": DDPMScheduler}


def load_pixel_model(identifier: str, device: torch.device | str = "cpu") -> DDPMPipeline:
    """A DDPM, float32, its weights frozen.

    Raises:
        InputError: it cannot be loaded, or predicts something else than epsilon.
    """
    try:
        folder = identifier if Path(identifier).is_dir() else DDPMPipeline.download(identifier, use_safetensors=True)
        pipe = DDPMPipeline.from_pretrained(folder, dtype=torch.float32, use_safetensors=True, local_files_only=True)
    except Exception as error:  # diffusers, the hub client and safetensors each raise their own kinds
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{identifier}: cannot be loaded as a DDPM in safetensors ({reason})") from None
    if pipe.scheduler.config.prediction_type != "epsilon":
        raise InputError(f"{identifier}: predicts {pipe.scheduler.config.prediction_type}, not epsilon")
    pipe.unet.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)
    return pipe


def generator_of(seed: int, number: int) -> torch.Generator:
    """Of one picture; torch keeps 32 bits of a seed, so both numbers are mixed into them."""
    mixed = np.random.SeedSequence([seed, number]).generate_state(1)[0]
    return torch.Generator().manual_seed(int(mixed))


@torch.no_grad()
def sample_pixels(
    pipe: DDPMPipeline,
    numbers: Sequence[int],
    *,
    labels: Tensor | None = None,
    sampler: str = "ddim",
    steps: int = 50,
    seed: int = 0,
    guide: Guide | None = None,
) -> Tensor:
    """The pictures of these ``numbers``, ``(n, c, h, w)`` in [-1, 1], as one batch, on the CPU.

    Picture i depends on ``seed`` and i alone.

    Args:
        labels: class of every picture, ``(n,)``, for a class-conditional model.
        sampler: ``ddim`` (eta 0) or ``ddpm``.
        guide: what the sampler follows at each step; it is given the same prediction as both halves.
    """
    unet, device = pipe.unet, pipe.unet.device
    size = (unet.config.in_channels, unet.config.sample_size, unet.config.sample_size)
    scheduler = SAMPLERS[sampler].from_config(pipe.scheduler.config)
    scheduler.set_timesteps(steps)
    generators = [generator_of(seed, i) for i in numbers]
    x = torch.cat([torch.randn(1, *size, generator=generator) for generator in generators]).to(device)
    classes = None if labels is None else labels.to(device)
    for index, t in enumerate(scheduler.timesteps.tolist()):
        eps = unet(x, t, classes).sample
        if guide:
            alpha_bar = scheduler.alphas_cumprod[t].item()
            eps = guide(index, NoisePrediction(t, x, eps, eps, alpha_bar**0.5, (1 - alpha_bar) ** 0.5, "epsilon"))
        x = scheduler.step(eps, t, x, generator=generators).prev_sample  # ty: ignore[invalid-argument-type]
    return x.clamp(-1, 1).cpu()
