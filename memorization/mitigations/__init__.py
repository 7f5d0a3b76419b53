"""Mitigations, one file a method: a :class:`Case` in, a :class:`Remedy` out.

Each has a ``name``, one parameter ``strength`` whose meaning its docstring gives, and five ``strengths`` from mild to
strong. Those with a ``lowers`` stop at a level of that detector, so they need a calibration, or a ``target``.
"""

from __future__ import annotations

import math
from dataclasses import fields
from typing import Protocol

from memorization.errors import InputError
from memorization.mitigations.amg import AMG
from memorization.mitigations.attention_rescale import AttentionRescale
from memorization.mitigations.case import Case, Guide, Remedy, level_of
from memorization.mitigations.embedding_descent import Anisotropy, NoiseNorm
from memorization.mitigations.guidance_schedule import DynamicTransition, StaticTransition
from memorization.mitigations.perturbation import EmbeddingNoise, RandomNumbers, RandomTokens, WordRepetition
from memorization.mitigations.rewrite import Rewrite
from memorization.mitigations.sail import Sail

__all__ = ["AMG", "MITIGATIONS", "Case", "Guide", "Mitigation", "Remedy", "level_of", "make_mitigation"]


class Mitigation(Protocol):
    """What every mitigation offers. One with ``lowers`` needs that detector's levels."""

    name: str
    strength: float
    strengths: tuple[float, ...]

    def __call__(self, case: Case) -> Remedy:
        """The remedy for all prompts of the case at once."""


MITIGATIONS: dict[str, type[Mitigation]] = {
    cls.name: cls
    for cls in (
        Anisotropy, NoiseNorm, Rewrite, Sail, StaticTransition, DynamicTransition, AttentionRescale,
        RandomNumbers, RandomTokens, WordRepetition, EmbeddingNoise, AMG,
    )
}  # fmt: skip


def make_mitigation(name: str, settings: dict | None = None) -> Mitigation:
    """A mitigation by name, with its default settings or others.

    Raises:
        InputError: there is none of that name, it has no such setting, or the setting makes no sense.
    """
    settings = settings or {}
    if name not in MITIGATIONS:
        raise InputError(f"unknown method {name}; there are: {', '.join(MITIGATIONS)}")
    known = {setting.name: setting.default for setting in fields(MITIGATIONS[name])}
    for setting, value in settings.items():
        if setting not in known:
            raise InputError(f"{name} has no setting {setting!r}; it has: {', '.join(known)}")
        words = isinstance(known[setting], str)
        if not words and (not isinstance(value, (int, float)) or not 0 < value < math.inf):
            raise InputError(f"{name}: {setting} = {value} is no number above 0")
        if words and not isinstance(value, str):
            raise InputError(f"{name}: {setting} = {value} is no word")
    return MITIGATIONS[name](**settings)
