"""The constants of AMG's guidances and their gate, by preset (memorization/configs/mitigations/amg.yaml)."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
import yaml
from torch import Tensor

from memorization.errors import InputError
from memorization.paths import CONFIGS
from memorization.settings import Count, NotNegative, make


@dataclass(frozen=True)
class Terms:
    """Constants of the three guidances and their gate; memorization/configs/mitigations/amg.yaml explains them."""

    gate_start: float
    gate_end: float
    gate_decay: NotNegative
    c1: NotNegative
    c2: NotNegative
    c3: NotNegative
    ungated_spe: bool = False
    relative_dup: bool = False  # c2 counts in units of s0 - s1 - 1
    min_captions: Count = 1
    hold: Count = 1  # steps that deduplication lasts once it is triggered, the first of them included
    second_look: bool = False  # dissimilarity goes by the picture that the other two guidances leave
    sim_above: float | Literal["gate"] | None = None  # the weight is c3 times the excess over this, or over the "gate"
    sim_rate: float = 0.0  # by which its logarithm grows a timestep

    def gate(self, t: float) -> float:
        """Where the gate stands at timestep ``t``, in the unit of the measure."""
        return self.gate_start + (self.gate_end - self.gate_start) * math.exp(-self.gate_decay * t)

    def scales(self, m: Tensor, s0: float, spe: bool = True) -> tuple[Tensor, Tensor]:
        """(s1, s2) of equations 13 and 15; s1 + s2 <= s0 - 1; s1 is 0 without despecification."""
        room = max(s0 - 1, 0.0)
        s1 = (self.c1 * m).clamp(0, room) * spe
        left = room - s1
        s2 = self.c2 * m * (left if self.relative_dup else 1)
        return s1, torch.minimum(s2.clamp_min(0), left)

    def sim_weight(self, sigma: Tensor, excess: Tensor, t: float) -> Tensor:
        """The factor of s * grad sigma; ``excess``: how far sigma lies above the gate."""
        factor = torch.ones_like(sigma)
        if self.sim_above is not None:
            factor = excess if isinstance(self.sim_above, str) else (sigma - self.sim_above).clamp_min(0)
        return self.c3 * math.exp(self.sim_rate * (1000 - t)) * factor


FARTHEST = 1.95  # a gate on nL2; the nearest picture is never farther than 2, and pure noise is at about 2


def find_terms(preset: str, measure: str, strength: float = 1.0, **changed: float | None) -> Terms:
    """A preset's constants for a measure (``nl2``, ``sscd`` or ``clip``); its gate is ``strength`` times as far away.

    Raises:
        InputError: there is none; or the measure is ``clip`` and no gate is given, since what is near differs from
            checkpoint to checkpoint.
    """
    if measure == "clip":
        if None in (changed.get("gate_start"), changed.get("gate_end")):
            raise InputError("amg: an index of CLIP features needs its own gate: --set gate_start=X --set gate_end=Y")
        measure = "sscd"
    presets = yaml.safe_load((CONFIGS / "mitigations" / "amg.yaml").read_text(encoding="utf-8"))
    if measure not in presets.get(preset, {}):
        known = ", ".join(name for name, measures in presets.items() if measure in measures)
        raise InputError(f"amg: no preset {preset!r} for {measure}; there are: {known}")
    terms = make(Terms, presets[preset][measure], f"amg: preset {preset}")
    terms = replace(terms, **{name: value for name, value in changed.items() if value is not None})
    if measure == "nl2":

        def moved(gate: float) -> float:
            return min(gate * strength, max(gate, FARTHEST))
    else:

        def moved(gate: float) -> float:
            return gate / strength

    return replace(terms, gate_start=moved(terms.gate_start), gate_end=moved(terms.gate_end))
