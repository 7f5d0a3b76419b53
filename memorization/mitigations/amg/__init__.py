"""AMG, anti-memorization guidance: steer away from the nearest training picture, while the picture is being made.

Chen, Liu, Xu, "Towards Memorization-Free Diffusion Models", CVPR 2024 (arXiv 2404.00922), equations 7 to 17. With
x0_hat the clean picture that eps_hat = eps_u + s0 (eps_c - eps_u) implies, n_0 the training picture nearest to it,
sigma its nearness and lambda_t a gate that rises towards the last step:

    eps_hat += 1{sigma > lambda_t} (G_spe + G_dup + G_sim)
    G_spe = -s1 (eps_c - eps_u),           s1 = max(min(c1 m, s0 - 1), 0)         despecification
    G_dup = -s2 (eps(x_t, y_N) - eps_u),   s2 = max(min(c2 m, s0 - s1 - 1), 0)    y_N: the caption of n_0
    G_sim = c3 s grad_{x_t} sigma                                                 dissimilarity

The gradient holds eps_hat constant, so it passes through the decoder alone; its sign is the one that lowers sigma. With
an index of latents, x0_hat is compared as it is, and nothing is decoded.

Deviations. m is sigma for cosines, but sigma + 2 for nL2, whose sigma is never positive: else s1 and s2 were always 0.
A row whose gate is closed looks again after ``every`` steps only, a row whose gate is open at every step: the decoder
and the search are paid where something is near. The published code looks twice a step, but leaves the first 21
pictures alone. An index of latents is ours. For nL2, dissimilarity counts the excess over the gate (as the authors'
CIFAR-10 code does) and grows towards the last step (as their Stable Diffusion code does). The gates are those of their
scripts, and c1 and c2 for cosines too; c3 is ours, since its unit depends on the model.

The preset ``official-code`` does what the authors' Stable Diffusion code does with these terms: despecification without
a gate; deduplication for ten steps from every opening of the gate on, once a caption was found often; then similarity,
gate and gradient again, at the picture that these two leave, for dissimilarity. Its deviations: neighbours by SSCD, not
by CLIP; the nearest picture's caption, among 50 neighbours, not the most common one of 1,000; no memory of captions
from one picture to the next; no picture is left alone.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from memorization.errors import InputError
from memorization.index.store import Index
from memorization.mitigations.amg.guide import AntiMemorization
from memorization.mitigations.amg.nearest import Nearest
from memorization.mitigations.amg.terms import Terms, find_terms
from memorization.mitigations.base import MITIGATIONS, Mitigation
from memorization.mitigations.case import Case, Remedy
from memorization.models.decoding import decode_pixels
from memorization.settings import Count, NotNegative, Positive

GUIDANCES = ("spe", "dup", "sim")


@cache
def open_index(folder: str) -> Index:
    """An index, opened once."""
    return Index(Path(folder))


@MITIGATIONS.register
@dataclass(frozen=True)
class AMG(Mitigation):
    """``amg``. ``strength``: how much farther than the preset's gate a picture must stay: nL2 times, cosine over it.

    Args:
        index: folder of an index of training pictures (python -m memorization.index build).
        preset: of memorization/configs/mitigations/amg.yaml.
        guidances: any of spe, dup and sim, joined by +.
        every: steps until a row whose gate is closed looks again.
        gate_start, gate_end, gate_decay, c1, c2, c3, sim_rate: instead of the preset's.
    """

    strength: Positive = 1.0
    index: str = ""
    preset: str = "paper-main"
    guidances: str = "spe+dup+sim"
    every: Count = 3
    gate_start: float | None = None
    gate_end: float | None = None
    gate_decay: NotNegative | None = None
    c1: NotNegative | None = None
    c2: NotNegative | None = None
    c3: NotNegative | None = None
    sim_rate: float | None = None

    name: ClassVar[str] = "amg"
    asks: ClassVar[tuple[str, ...]] = ("eps", "pictures")
    needs_index: ClassVar[bool] = True
    strengths: ClassVar[tuple[float, ...]] = (0.8, 0.9, 1.0, 1.15, 1.3)

    def __post_init__(self) -> None:
        super().__post_init__()
        if unknown := set(self.guidances.split("+")) - {*GUIDANCES, "none"}:
            raise InputError(f"amg: no guidance {', '.join(sorted(unknown))}; there are: {', '.join(GUIDANCES)}")

    def terms(self, measure: str) -> Terms:
        """The constants for an index of this measure."""
        names = [f.name for f in fields(self) if f.name.startswith(("gate_", "c", "sim_"))]
        return find_terms(self.preset, measure, self.strength, **{name: getattr(self, name) for name in names})

    def nearest(self) -> Nearest:
        """The index that was named.

        Raises:
            InputError: none was, or it is too small.
        """
        if not self.index:
            raise InputError("amg needs an index of training pictures: python -m memorization.index build makes one")
        nearest = Nearest(open_index(self.index))
        if nearest.measure == "nl2" and len(nearest.index) < nearest.k:
            raise InputError(
                f"amg: nL2 needs an index of {nearest.k} pictures or more; {self.index} has {len(nearest.index)}"
            )
        return nearest

    def record(self) -> dict:
        """Everything that its pictures depend on, for a run's settings."""
        nearest = self.nearest()
        return {**vars(self), "index": nearest.index.digest, "terms": vars(self.terms(nearest.measure))}

    def guide(self, case: Case) -> AntiMemorization:
        """A fresh guide for a generation of rows of ``case``."""
        nearest, pipe = self.nearest(), case.pipe
        index, latents = nearest.index, nearest.index.kind == "latents"
        if latents and index.features.shape[1] != case.noise[0].numel():
            raise InputError(f"{self.index}: holds latents of {index.features.shape[1]} numbers, the model's have "
                f"{case.noise[0].numel()}; build it with the model's autoencoder and size")  # fmt: skip
        if not latents and "sim" in self.guidances and pipe.vae.dtype == torch.float16:
            raise InputError("amg: gradients are lost in float16; give --dtype float32 or bfloat16")
        embed = cache(lambda caption: pipe.embed([caption])[0])

        def describe(x0: Tensor) -> Tensor:
            return x0.flatten(1) if latents else index.describe(decode_pixels(pipe, x0))

        def caption_eps(latents: Tensor, timestep: int, captions: list[str]) -> Tensor:
            return pipe.predict_noise(latents, timestep, torch.stack([embed(caption) for caption in captions]))

        return AntiMemorization(
            nearest, self.terms(nearest.measure), frozenset(self.guidances.split("+")), case.guidance_scale,
            self.every, describe, caption_eps,
        )  # fmt: skip

    def pixel_guide(self) -> AntiMemorization:
        """A fresh guide for one batch of pictures of a pixel-space model.

        Dissimilarity alone acts: without a prompt there is no guidance vector to take back, nor a caption to
        steer from.
        """
        nearest = self.nearest()
        return AntiMemorization(
            nearest, self.terms(nearest.measure), frozenset({"sim"}), 1.0, self.every,
            lambda x0: nearest.index.describe(x0.clamp(-1, 1)),
        )  # fmt: skip

    def __call__(self, case: Case) -> Remedy:
        self.guide(case)  # what is wrong is said before any picture is made
        return Remedy.unchanged(case, guide=lambda rows: self.guide(case))
