"""Detectors: pure functions of a noise trace, one file a method.

A one-step detector names the steps of the DDIM grid it reads and turns a trace into per-image values. All detectors of
a run share one trace, so running more of them costs no UNet call.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from memorization.detectors.anisotropy import Anisotropy
from memorization.detectors.noise_norm import NoiseNorm
from memorization.errors import InputError

if TYPE_CHECKING:
    from local_sd_pipeline import NoisePrediction


class Detector(Protocol):
    """What a one-step detector offers."""

    name: str
    steps: tuple[int, ...]  # places in the DDIM grid whose trace it reads: 0 the noisiest, -1 the last
    terms: tuple[str, ...]  # the values it gives, its own name first; the others are its terms

    def __call__(self, trace: list[NoisePrediction]) -> dict[str, Tensor]:
        """Values ``(prompts, images)`` under each name of ``terms``, from the predictions at ``steps``; higher means
        memorized."""


DETECTORS: dict[str, type[Detector]] = {cls.name: cls for cls in (Anisotropy, NoiseNorm)}


def make_detectors(names: list[str], settings: dict[str, dict]) -> list[Detector]:
    """Detectors by name, each with its own settings.

    Raises:
        InputError: for a name that is not in ``DETECTORS``.
    """
    if unknown := [name for name in names if name not in DETECTORS]:
        raise InputError(f"unknown detector {', '.join(unknown)}; there are: {', '.join(DETECTORS)}")
    return [DETECTORS[name](**settings.get(name, {})) for name in dict.fromkeys(names)]
