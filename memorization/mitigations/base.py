"""What every mitigation offers: a :class:`~memorization.mitigations.case.Case` in, a ``Remedy`` out.

Each has a ``name``, one parameter ``strength`` whose meaning its docstring gives, and five ``strengths`` from mild to
strong. A mitigation is a frozen dataclass that derives from :class:`Mitigation` and is registered::

    @MITIGATIONS.register
    @dataclass(frozen=True)
    class Mine(Mitigation):
        strength: Positive = 0.5
        name: ClassVar[str] = "mine"
        strengths: ClassVar[tuple[float, ...]] = (0.1, 0.3, 0.5, 0.7, 0.9)

        def __call__(self, case):
            return Remedy.unchanged(case, embeds=(1 - self.strength) * case.embeds)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from memorization.errors import InputError
from memorization.registry import Registry
from memorization.settings import Checked

if TYPE_CHECKING:
    from memorization.mitigations.case import Case, Remedy

Levels = Mapping[str, Mapping[float, float]]  # detector -> share of ordinary prompts -> score below which it lies


class Mitigation(Checked, ABC):
    """What every mitigation offers.

    Attributes:
        strength: how strongly it acts.
        strengths: from mild to strong, for comparisons.
        lowers: the detector whose score it lowers to a level; such a mitigation needs a calibration, or a ``target``.
        target: the score to reach, instead of a level.
        needs_index: whether it has a setting ``index``, the folder of an index of training pictures.
        asks: what of a model it needs that not every one has, of ``ABILITIES`` in memorization/models/base.py.
    """

    name: ClassVar[str]
    strength: float
    strengths: ClassVar[tuple[float, ...]]
    lowers: ClassVar[str | None] = None
    target: float | None = None
    needs_index: ClassVar[bool] = False
    asks: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def __call__(self, case: Case) -> Remedy:
        """The remedy for all prompts of the case at once; every prompt is treated as if it were alone."""

    def record(self) -> dict:
        """Everything that its pictures depend on, for a run's settings."""
        return dict(vars(self))

    @property
    def needs_level(self) -> bool:
        """Whether it aims at a level, which a calibration has to give."""
        return self.lowers is not None and self.target is None

    def bound(self, levels: Levels) -> float:
        """Where it stops: at its ``target``, or at the score below which a share ``strength`` of ordinary prompts lies.

        Raises:
            InputError: the levels do not say.
        """
        if self.target is not None:
            return self.target
        known = levels.get(self.lowers or "", {})
        if self.strength not in known:
            raise InputError(
                f"no level {self.strength:g} of {self.lowers} in the calibration (it holds: "
                f"{', '.join(f'{share:g}' for share in known) or 'none'}); calibrate with detect_eval.py --calibrate, "
                "or give the score to reach: --set target=X"
            )
        return known[self.strength]


MITIGATIONS: Registry[Mitigation] = Registry(
    "method",
    "memorization.mitigations",
    (
        "anisotropy", "noise_norm", "second_look", "rewrite", "reanchor", "sail", "static_transition",
        "dynamic_transition", "attention_rescale", "padding_mask", "nemo", "rna", "rt", "cwr", "gni", "amg",
    ),
    "memorization.mitigations",
)  # fmt: skip


DEFAULT_MITIGATION = "anisotropy"


def make_mitigation(name: str, settings: Mapping | None = None) -> Mitigation:
    """A mitigation by name, with its default settings or others.

    Raises:
        InputError: there is none of that name, it has no such setting, or a value makes no sense.
    """
    return MITIGATIONS.make(name, settings)
