"""What a map is given and what it gives. Higher values mean copied.

A map is a frozen dataclass that derives from :class:`Map` and is registered::

    @MAPS.register
    @dataclass(frozen=True)
    class Mine(Map):
        timestep: Timestep = 10
        name: ClassVar[str] = "mine"

        def __call__(self, last, predict):
            return predict(last.after[:, None], self.timestep)[:, 0].square().sum(1)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

from memorization.registry import Registry
from memorization.settings import Checked

if TYPE_CHECKING:
    from torch import Tensor

    from memorization.models.generation import Step
    from memorization.models.predictor import Predictor


class Map(Checked, ABC):
    """What every map offers.

    Attributes:
        needs_attention: whether it reads the attention of the last step.
        takes_differences: whether it asks the model at points near by, whose small differences need float32.
        asks: what of a model it needs that not every one has, of ``ABILITIES`` in memorization/models/base.py.
    """

    name: ClassVar[str]
    needs_attention: ClassVar[bool] = False
    takes_differences: ClassVar[bool] = False
    asks: ClassVar[tuple[str, ...]] = ("pictures",)

    @abstractmethod
    def __call__(self, last: Step, predict: Predictor) -> Tensor:
        """``(rows, h, w)`` at the latents' size, from the last step of a generation; rows of ``predict`` are its."""

    def record(self) -> dict:
        """Everything that its values depend on, for a run's settings."""
        return dict(vars(self))


MAPS: Registry[Map] = Registry(
    "map",
    "memorization.localisation",
    ("bright_ending", "score_difference", "curvature"),
    "memorization.localisation",
)


def make_maps(names: Sequence[str], settings: Mapping[str, Mapping] | None = None) -> list[Map]:
    """Maps by name, each with its own settings; the name ``all`` stands for every one.

    Raises:
        InputError: there is none of a name, it has no such setting, or a value makes no sense.
    """
    chosen = list(MAPS) if list(names) == ["all"] else names
    return [MAPS.make(name, (settings or {}).get(name)) for name in dict.fromkeys(chosen)]
