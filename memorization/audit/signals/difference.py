"""How far the fine-tune has moved from the base under a prompt.

    || x0_hat_ft(x, c) - x0_hat_base(x, c) || / sqrt(d)

On pure noise at the noisiest step of the 50-step DDIM grid; needs no unconditional branch. The field is that of
FineXtract (ICML 2025), which extracts pictures along it; as a detector it is a hypothesis of this project.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from memorization.audit.signals.base import SIGNALS, Look, Signal
from memorization.settings import Timestep


@SIGNALS.register
@dataclass(frozen=True)
class Difference(Signal):
    """``difference``: at least 0, 0 for the base itself."""

    timestep: Timestep = 981

    name: ClassVar[str] = "difference"
    on: ClassVar = "noise"

    def __call__(self, tuned: Look, base: Look) -> Tensor:
        return tuned.length(tuned.cond - base.cond)
