"""Pictures of a case, with or without a remedy, from the same noise."""

from __future__ import annotations

from contextlib import nullcontext

import numpy as np
import torch

from memorization.mitigations.case import Case, Remedy
from memorization.models.decoding import decode
from memorization.models.generation import generate


@torch.no_grad()
def sample(case: Case, remedy: Remedy) -> np.ndarray:
    """Pictures, uint8 ``(prompts, noises, h, w, 3)``.

    Raises:
        InputError: one is not finite; names the prompt.
    """
    empty = case.pipe.embed([""])
    noises = len(case.noise)
    pictures = []
    for rows in torch.arange(len(remedy.embeds) * noises, device=case.noise.device).split(max(1, case.batch_size // 2)):
        names = [case.prompts[i] for i in (rows // noises).tolist()]
        with remedy.around(rows) if remedy.around else nullcontext():
            *_, last = generate(
                case.pipe, remedy.embeds[rows // noises], empty, remedy.latents.flatten(0, 1)[rows], steps=case.steps,
                guidance_scale=case.guidance_scale, guide=remedy.guide(rows) if remedy.guide else None,
                names=names,
            )  # fmt: skip
        pictures += decode(case.pipe, last.after, names)
    return np.stack(pictures).reshape(-1, noises, *pictures[0].shape)
