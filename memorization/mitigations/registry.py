"""Which mitigations there are, and how they are made."""

from __future__ import annotations

import math
from dataclasses import fields

from memorization.errors import InputError
from memorization.mitigations.amg import AMG
from memorization.mitigations.anisotropy import Anisotropy
from memorization.mitigations.attention_rescale import AttentionRescale
from memorization.mitigations.base import Mitigation
from memorization.mitigations.cwr import WordRepetition
from memorization.mitigations.dynamic_transition import DynamicTransition
from memorization.mitigations.gni import EmbeddingNoise
from memorization.mitigations.noise_norm import NoiseNorm
from memorization.mitigations.rewrite import Rewrite
from memorization.mitigations.rna import RandomNumbers
from memorization.mitigations.rt import RandomTokens
from memorization.mitigations.sail import Sail
from memorization.mitigations.static_transition import StaticTransition

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
