"""Length of the guidance vector under the fine-tune, in x0 space.

    D = || x0_hat_c - x0_hat_u || / sqrt(d)

On pure noise at the noisiest step of the 50-step DDIM grid. Wen et al., ICLR 2024, up to a constant.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from memorization.audit.signals.base import SIGNALS, Look, Signal
from memorization.settings import Timestep


@SIGNALS.register
@dataclass(frozen=True)
class Guidance(Signal):
    """``guidance``: at least 0."""

    timestep: Timestep = 981

    name: ClassVar[str] = "guidance"
    on: ClassVar = "noise"

    def __call__(self, tuned: Look, base: Look) -> Tensor:
        return tuned.length(tuned.cond - tuned.uncond)
