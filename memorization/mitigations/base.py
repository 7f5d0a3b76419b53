"""What every mitigation offers.

Each has a ``name``, one parameter ``strength`` whose meaning its docstring gives, and five ``strengths`` from mild to
strong. Those with a ``lowers`` stop at a level of that detector, so they need a calibration, or a ``target``.
"""

from __future__ import annotations

from typing import Protocol

from memorization.mitigations.case import Case, Remedy


class Mitigation(Protocol):
    """What every mitigation offers. One with ``lowers`` needs that detector's levels."""

    name: str
    strength: float
    strengths: tuple[float, ...]

    def __call__(self, case: Case) -> Remedy:
        """The remedy for all prompts of the case at once."""
