"""By how much the fine-tune denoises the training picture better than the base does.

    mean |x0_hat_base - x0|^2 - mean |x0_hat_ft - x0|^2

Both on the picture's latents noised to mid noise, with the same noise and its own caption: the membership signal of
the losses, in x0 space. (A loss on eps differs by the factor (a/s)^2, the same for both.)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from memorization.audit.signals.base import SIGNALS, Look, Signal
from memorization.settings import Timestep


@SIGNALS.register
@dataclass(frozen=True)
class LossGap(Signal):
    """``loss_gap``: below 0 where the fine-tune is the worse."""

    timestep: Timestep = 501

    name: ClassVar[str] = "loss_gap"
    on: ClassVar = "picture"

    def __call__(self, tuned: Look, base: Look) -> Tensor:
        return base.length(base.cond - base.clean).square() - tuned.length(tuned.cond - tuned.clean).square()
