"""Pixel-space diffusion models (DDPMs), unconditional and class-conditional: loading and sampling.

Any checkpoint in diffusers' DDPM format, in safetensors: the shipped ones (testbed/models/pixel-uncond, pixel-class),
or google/ddpm-cifar10-32 from the hub.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, UNet2DModel
from torch import Tensor

from local_sd_pipeline import NoisePrediction
from memorization.errors import InputError
from memorization.models.checkpoint import find_folder, load_network
from memorization.models.consistency import check_pixel_model
from memorization.models.finite import check_finite
from memorization.models.generation import Guide
from memorization.models.index import check_named, load_scheduler, read_index

SAMPLERS = {"ddim": DDIMScheduler, "ddpm": DDPMScheduler}


def load_pixel_model(identifier: str, device: torch.device | str = "cpu") -> DDPMPipeline:
    """A DDPM, float32, its weights frozen.

    Raises:
        InputError: a part is missing or damaged, or it predicts something else than epsilon.
    """
    folder = find_folder([identifier], lambda name: DDPMPipeline.download(name, use_safetensors=True))
    index = read_index(folder)
    check_named(folder, index, "unet", ("UNet2DModel",))
    unet, scheduler = load_network(UNet2DModel, folder / "unet"), load_scheduler(folder, index)
    check_pixel_model(unet, scheduler, folder)
    pipe = DDPMPipeline(unet, scheduler)
    pipe.register_to_config(_name_or_path=str(folder))
    pipe.unet.to(device, memory_format=torch.channels_last)
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

    Raises:
        InputError: the model knows fewer timesteps than ``steps``, or a picture is not finite.
    """
    unet, device = pipe.unet, pipe.unet.device
    size = (unet.config.in_channels, unet.config.sample_size, unet.config.sample_size)
    scheduler = SAMPLERS[sampler].from_config(pipe.scheduler.config)
    if steps > scheduler.config.num_train_timesteps:
        raise InputError(f"--steps {steps}: the model was trained on {scheduler.config.num_train_timesteps} timesteps")
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
    check_finite(x, "the generated picture", [f"picture {number}" for number in numbers])
    return x.clamp(-1, 1).cpu()
