"""``gni``: Gaussian noise is added to the embedding (Somepalli et al., see perturbation.py).

Deviation: the authors' code adds noise to the empty prompt's embedding too; here the unconditional branch stays as it
is, so that scores before and after have the same one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from memorization.mitigations.base import MITIGATIONS, Mitigation
from memorization.mitigations.case import Case, Remedy
from memorization.mitigations.perturbation import generator_of
from memorization.settings import Positive


@MITIGATIONS.register
@dataclass(frozen=True)
class EmbeddingNoise(Mitigation):
    """``gni``. ``strength``: standard deviation of the noise."""

    strength: Positive = 0.3

    name: ClassVar[str] = "gni"
    strengths: ClassVar[tuple[float, ...]] = (0.1, 0.3, 1, 2, 4)

    def __call__(self, case: Case) -> Remedy:
        noise = [generator_of(prompt, case.seed).standard_normal(case.embeds.shape[1:]) for prompt in case.prompts]
        noise = torch.from_numpy(np.stack(noise)).to(case.embeds)
        return Remedy.unchanged(case, embeds=case.embeds + self.strength * noise * case.pipe.free(case.embeds))
