"""Which detectors there are, and how they are made."""

from __future__ import annotations

from dataclasses import fields

from memorization.detectors.anisotropy import Anisotropy
from memorization.detectors.attention_entropy import AttentionEntropy
from memorization.detectors.base import Detector
from memorization.detectors.bright_ending import BrightEnding
from memorization.detectors.flipd import Flipd
from memorization.detectors.fused import Fused
from memorization.detectors.guidance_flux import GuidanceFlux
from memorization.detectors.noise_norm import NoiseNorm
from memorization.detectors.one_step import OneStepDenoising
from memorization.detectors.p_laplace import PLaplace
from memorization.detectors.sharpness import Sharpness
from memorization.detectors.trajectory_norm import TrajectoryNorm
from memorization.detectors.trajectory_z import TrajectoryZ
from memorization.detectors.transition_norm import Transition
from memorization.errors import InputError

DETECTORS: dict[str, type[Detector]] = {
    cls.name: cls
    for cls in (
        Anisotropy, NoiseNorm, OneStepDenoising, Fused, Sharpness, Flipd, TrajectoryNorm, BrightEnding,
        AttentionEntropy, Transition, TrajectoryZ, GuidanceFlux, PLaplace,
    )
}  # fmt: skip


def make_detectors(names: list[str], settings: dict[str, dict]) -> list[Detector]:
    """Detectors by name, each with its own settings; the name ``all`` stands for every one.

    Raises:
        InputError: for a name that is not in ``DETECTORS``, or a setting that the detector has not.
    """
    if names == ["all"]:
        names = list(DETECTORS)
    if unknown := [name for name in names if name not in DETECTORS]:
        raise InputError(f"unknown detector {', '.join(unknown)}; there are: {', '.join(DETECTORS)}, or all")
    for name, chosen in settings.items():
        known = [field.name for field in fields(DETECTORS[name])]
        if unknown := [setting for setting in chosen if setting not in known]:
            raise InputError(f"{name} has no setting {unknown[0]!r}; it has: {', '.join(known) or 'none'}")
    return [DETECTORS[name](**settings.get(name, {})) for name in dict.fromkeys(names)]
