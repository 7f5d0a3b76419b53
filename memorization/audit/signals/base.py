"""What a signal is given and gives.

    @SIGNALS.register
    @dataclass(frozen=True)
    class Mine(Signal):
        name: ClassVar[str] = "mine"
        on: ClassVar[str] = "noise"
        timestep: Timestep = 981

        def __call__(self, tuned, base):
            return tuned.length(tuned.cond - tuned.uncond)

Its file lies in this folder under its name, and its name goes into ``SIGNALS`` below.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, Literal, NamedTuple

from torch import Tensor

from memorization.registry import Registry
from memorization.settings import Checked, Timestep


class Look(NamedTuple):
    """What one model predicts on some latents at one timestep, as clean latents x0_hat.

    Attributes:
        cond: under each prompt, ``(prompts, noises, c, h, w)``, float32.
        uncond: under the empty prompt.
        clean: the training picture's own latents, ``(prompts, 1, c, h, w)``; 0 on pure noise.
    """

    cond: Tensor
    uncond: Tensor
    clean: Tensor

    @staticmethod
    def length(field: Tensor) -> Tensor:
        """||field|| / sqrt(d), ``(prompts, noises)``: the root mean square over a latent's numbers."""
        return field.flatten(2).square().mean(2).sqrt()


class Signal(Checked, ABC):
    """One number a prompt and noise; higher means copied.

    Attributes:
        on: ``noise``: pure noise is looked at; ``picture``: the training picture's latents, noised to ``timestep``.
        timestep: t of the training schedule.
    """

    name: ClassVar[str]
    on: ClassVar[Literal["noise", "picture"]]
    timestep: Timestep

    @abstractmethod
    def __call__(self, tuned: Look, base: Look) -> Tensor:
        """Values ``(prompts, noises)``."""

    def record(self) -> dict[str, Any]:
        """Its settings, for a run's."""
        return dict(vars(self))


SIGNALS: Registry[Signal] = Registry(
    "signal",
    "memorization.audit.signals",
    ("guidance", "guidance_ratio", "difference", "loss_gap"),
    "memorization.signals",
)
DEFAULT_SIGNAL = "difference"  # says which pictures are at risk; 0 for an epoch that has changed nothing
