"""Which tokens of a prompt make it give back a training image.

Wen, Liu, Chen, Lyu, ICLR 2024, section 4.2: the significance of a token is the size of the gradient, with respect
to its embedding, of the norm of the guidance vector at the first step. As in the public code, a token's embedding is
the text encoder's output at its place.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import torch
from torch import Tensor

from memorization.io.figures import save_figure
from memorization.models.base import TextToImage


class Significance(NamedTuple):
    """The tokens of a prompt, without start, end and padding, and their significance, ``(tokens,)``."""

    tokens: list[str]
    values: Tensor


def token_significance(pipe: TextToImage, prompt: str, latents: Tensor, timestep: int, uncond: Tensor) -> Significance:
    """Gradient norms of the mean over ``latents (noises, c, h, w)`` of || eps_c - eps_u ||.

    Args:
        timestep: of the first step.
        uncond: eps of the empty prompt on the same latents.
    """
    with torch.no_grad():
        embeds = pipe.embed([prompt])
    with torch.enable_grad():
        embeds = embeds.float().requires_grad_()
        cond = pipe.predict_noise(latents, timestep, embeds.expand(len(latents), -1, -1))
        (gradient,) = torch.autograd.grad((cond - uncond).flatten(1).norm(dim=1).mean(), embeds)
    ids = pipe.tokenizer(prompt, truncation=True, max_length=pipe.tokenizer.model_max_length).input_ids[1:-1]
    tokens = [pipe.tokenizer.decode([token]).strip() for token in ids]
    return Significance(tokens, gradient[0, 1 : 1 + len(tokens)].norm(dim=1))


def as_text(significance: Significance, strongest: int = 3) -> str:
    """The prompt's tokens with the ``strongest`` marked by their share of the whole, for a terminal."""
    share = significance.values / significance.values.sum().clamp_min(1e-12)
    top = set(share.topk(min(strongest, len(share))).indices.tolist())
    return " ".join(f"[{token} {share[i]:.0%}]" if i in top else token for i, token in enumerate(significance.tokens))


def draw_significance(explained: list[Significance], path: Path) -> Path:
    """Bars of every token's significance, a row a prompt."""
    figure, axes = plt.subplots(len(explained), 1, figsize=(7, 1.5 * len(explained)), squeeze=False)
    for axis, (tokens, values) in zip(axes[:, 0], explained, strict=True):
        axis.bar(range(len(tokens)), values.cpu().numpy(), color="#cc3311")
        axis.set_xticks(range(len(tokens)), tokens, rotation=35, ha="right", fontsize=7,
                        parse_math=False)  # fmt: skip
        axis.set_yticks([])
    figure.suptitle("significance of each token for the norm of the guidance vector", fontsize=9)
    return save_figure(figure, path)
