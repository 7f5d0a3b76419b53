"""Pictures of a case, with or without a remedy, from the same noise."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext

import numpy as np
import torch
from torch import Tensor

from local_sd_pipeline import LocalStableDiffusionPipeline
from memorization.mitigations.case import Case, Remedy
from memorization.pictures import to_bytes
from memorization.trajectory import generate


@torch.no_grad()
def sample(case: Case, remedy: Remedy) -> np.ndarray:
    """Pictures, uint8 ``(prompts, images, h, w, 3)``."""
    empty = case.pipe.embed([""])
    images = len(case.noise)
    pictures = []
    for rows in torch.arange(len(remedy.embeds) * images, device=case.noise.device).split(max(1, case.batch_size // 2)):
        with remedy.around(rows) if remedy.around else nullcontext():
            *_, last = generate(
                case.pipe, remedy.embeds[rows // images], empty, remedy.latents.flatten(0, 1)[rows], steps=case.steps,
                guidance_scale=case.guidance_scale, guide=remedy.guide(rows) if remedy.guide else None,
            )  # fmt: skip
        pictures += decode(case.pipe, last.after)
    return np.stack(pictures).reshape(-1, images, *pictures[0].shape)


def decode_pixels(pipe: LocalStableDiffusionPipeline, latents: Tensor, at_once: int = 8) -> Tensor:
    """Pictures ``(rows, 3, h, w)`` about in [-1, 1], of scaled latents ``(rows, c, h, w)``; differentiable."""
    chunks = (latents / pipe.vae.config.scaling_factor).to(pipe.vae.dtype).split(at_once)
    return torch.cat([pipe.vae.decode(chunk).sample.float() for chunk in chunks])


def decode(pipe: LocalStableDiffusionPipeline, latents: Tensor, at_once: int = 8) -> Iterator[np.ndarray]:
    """Pictures, uint8 ``(h, w, 3)``, of scaled latents ``(rows, c, h, w)``."""
    for chunk in latents.split(at_once):
        yield from to_bytes(decode_pixels(pipe, chunk))
