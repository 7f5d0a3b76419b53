"""Deactivate the neurons that a memorized prompt excites.

Hintersdorf, Struppek, Kersting, Dziedzic, Boenisch, "Finding NeMo: Localizing Neurons Responsible For Memorization in
Diffusion Models", NeurIPS 2024. A neuron is an output of a value layer of the cross-attention in the down and middle
blocks; its activation under a prompt is the mean of its absolute value over the tokens.

1. Selection: all neurons whose activation lies more than theta standard deviations from its mean under ordinary
   prompts, and the k strongest of each layer. theta falls from 5 to 1 by .25 and k rises from 0 by 1 until the prompt
   counts as memorized no longer.
2. Refinement: layer by layer from the last, and in it down to single neurons, what can be switched on again without
   the prompt counting as memorized is switched on.

Deviations from the public code: a prompt counts as memorized while its ``noise_norm`` is above the level (there, while
the first step's predictions with and without the neurons have an SSIM above .428), so that the strength means what it
means for other methods; a layer that has to be off is halved again and again (there, every neuron of it is tried, which
takes more evaluations); where nothing reaches the level, refinement keeps the norm that was reached. Ordinary prompts
are those of ``reference``, else one to twelve random words (there, captions of LAION).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from memorization.errors import InputError
from memorization.io.files import sha256_of
from memorization.io.prompts import ordinary
from memorization.mitigations.base import MITIGATIONS, Mitigation
from memorization.mitigations.case import Case, Remedy
from memorization.mitigations.words import real_words
from memorization.settings import Positive

REFERENCES = 256  # ordinary prompts, at most
SELECTIONS = 17  # values of theta

Score = Callable[[Tensor], float]  # numbers of the neurons that are off -> the prompt's score


@MITIGATIONS.register
@dataclass(frozen=True)
class NeMo(Mitigation):
    """``nemo``.

    Args:
        strength: the level of ``noise_norm`` to reach.
        target: the norm to reach, instead.
        reference: a list of ordinary prompts; of a labelled one those with label 0, of its validation half.
    """

    strength: Positive = 0.5
    target: float | None = None
    reference: Path | None = None

    name: ClassVar[str] = "nemo"
    asks: ClassVar[tuple[str, ...]] = ("attention", "text")
    lowers: ClassVar[str] = "noise_norm"
    strengths: ClassVar[tuple[float, ...]] = (0.99, 0.9, 0.75, 0.5, 0.25)

    def record(self) -> dict:
        return {**vars(self), "reference": self.reference and f"sha256:{sha256_of(self.reference)}"}

    @torch.no_grad()
    def __call__(self, case: Case) -> Remedy:
        bound, layers = self.bound(case.levels), value_layers(case.pipe.unet)
        widths = [layer.out_features for layer in layers]
        ordinary_embeds = case.pipe.embed(self._ordinary(case))
        # Layers are called by themselves below: an offloaded UNet has come to the device for the scores by then.
        scores = case.score(self.lowers, case.embeds).tolist()
        usual = activations(layers, ordinary_embeds)
        mean, deviation = usual.mean(0), usual.std(0).clamp_min(1e-12)
        kept = torch.ones(len(case.prompts), len(mean), device=mean.device)
        for i, before in enumerate(scores):
            if before > bound:
                own = activations(layers, case.embeds[i : i + 1])[0]
                score = partial(norm_without, case, i, layers)
                off, reached = select(score, own, ((own - mean) / deviation).abs(), widths, bound)
                kept[i, refine(score, off, widths, max(bound, reached))] = 0
        rows_of = kept.repeat_interleave(len(case.noise), 0)
        return Remedy.unchanged(
            case,
            around=lambda rows: deactivated(layers, rows_of[rows].repeat(2, 1)),
            iterations=(kept == 0).sum(1).tolist(),
        )

    def _ordinary(self, case: Case) -> list[str]:
        if self.reference is not None:
            if len(prompts := ordinary(self.reference)[0][:REFERENCES]) < 2:
                raise InputError(f"{self.reference}: nemo needs two ordinary prompts or more")
            return prompts
        rng = np.random.default_rng(case.seed)
        words = real_words(case.pipe.tokenizer)
        return [" ".join(rng.choice(words, rng.integers(1, 13))) for _ in range(REFERENCES)]


def select(score: Score, own: Tensor, excited: Tensor, widths: Sequence[int], bound: float) -> tuple[Tensor, float]:
    """Numbers of the neurons to switch off, and the score without them.

    Args:
        own: activations, ``(neurons,)``.
        excited: by how many standard deviations each differs from ordinary prompts', ``(neurons,)``.
        widths: neurons of each layer.
    """
    off, reached = torch.empty(0, dtype=torch.long), float("inf")
    for k in range(SELECTIONS):
        strongest = torch.cat([torch.zeros_like(part).index_fill(0, part.topk(min(k, len(part))).indices, 1)
                               for part in own.split(list(widths))])  # fmt: skip
        off = ((excited > 5 - 0.25 * k) | (strongest > 0)).nonzero()[:, 0]
        if (reached := score(off)) <= bound:
            break
    return off, reached


def refine(score: Score, off: Tensor, widths: Sequence[int], bound: float) -> Tensor:
    """Those of the neurons ``off`` that have to be off for a score of at most ``bound``."""
    layer = torch.bucketize(off, torch.tensor(widths, device=off.device).cumsum(0), right=True)
    groups = [off[layer == i] for i in range(len(widths))]  # the last is tried first
    while groups:
        group = groups.pop()
        fewer = off[~torch.isin(off, group)]
        if len(group) and score(fewer) <= bound:
            off = fewer
        elif len(group) > 1:
            groups += group.chunk(2)
    return off


def norm_without(case: Case, i: int, layers: list[torch.nn.Linear], off: Tensor) -> float:
    """``noise_norm`` of prompt ``i`` with the neurons ``off``, in both halves: eps_u changes, too."""
    kept = torch.ones(1, sum(layer.out_features for layer in layers), device=off.device).index_fill(1, off, 0)
    halves = torch.stack([case.uncond.embedding[0].float(), case.embeds[i]]).repeat_interleave(len(case.noise), 0)
    with deactivated(layers, kept):
        uncond, cond = case.pipe.predict_noise(case.noise.repeat(2, 1, 1, 1), case.grid[0], halves).chunk(2)
    return (cond - uncond).flatten(1).norm(dim=1).mean().item()


def value_layers(unet) -> list[torch.nn.Linear]:
    """The value layers of the cross-attention in the down and middle blocks."""
    return [layer for name, layer in unet.named_modules()
            if name.endswith(".attn2.to_v") and not name.startswith("up_blocks")]  # fmt: skip


def activations(layers: list[torch.nn.Linear], embeds: Tensor) -> Tensor:
    """Mean over the tokens of each neuron's absolute value, ``(prompts, neurons)``, float32, layer after layer."""
    return torch.cat([layer(embeds.to(layer.weight.dtype)).float().abs().mean(1) for layer in layers], dim=1)


@contextmanager
def deactivated(layers: list[torch.nn.Linear], kept: Tensor) -> Iterator[None]:
    """While it lasts, outputs of ``layers`` are multiplied by ``kept (rows or 1, neurons)``, ones and zeros."""
    parts = kept.split([layer.out_features for layer in layers], dim=1)
    hooks = [
        layer.register_forward_hook(lambda module, given, out, part=part: out * part[:, None].to(out.dtype))
        for layer, part in zip(layers, parts, strict=True)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
