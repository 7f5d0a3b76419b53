"""How much longer the fine-tune has made the guidance vector: its D by that of the base, both as in ``guidance``.

1 where nothing has changed. A prompt that already pulls hard in the base does not count for it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from memorization.audit.signals.base import SIGNALS, Look, Signal
from memorization.settings import Timestep


@SIGNALS.register
@dataclass(frozen=True)
class GuidanceRatio(Signal):
    """``guidance_ratio``: at least 0. A base without any guidance (a blank prompt) counts as 1e-6."""

    timestep: Timestep = 981

    name: ClassVar[str] = "guidance_ratio"
    on: ClassVar = "noise"

    def __call__(self, tuned: Look, base: Look) -> Tensor:
        return tuned.length(tuned.cond - tuned.uncond) / base.length(base.cond - base.uncond).clamp_min(1e-6)
