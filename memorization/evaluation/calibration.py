"""What ``detect_eval.py --calibrate`` wrote: the settings that were fitted and the thresholds that hold for them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from memorization.errors import InputError
from memorization.evaluation.bands import ROUNDS, Bands
from memorization.io.files import read_file
from memorization.settings import Count, Steps, make

ADAPTER = "lora "  # what an adapter's name in a revision begins with
LEVELS = (0.25, 0.5, 0.75, 0.9, 0.99)  # shares of the prompts that are not memorized; mitigations aim at them


@dataclass(frozen=True)
class CalibratedDetector:
    """What a calibration says of one detector.

    Attributes:
        threshold: score from which on a prompt is flagged.
        settings: those that the threshold holds for, where some were fitted.
        bands: noises -> undecided band, where it was made with as many noises as the sequential mode may use.
        levels: share of the prompts that are not memorized -> score below which that share lies.
    """

    threshold: float
    realised_fpr: float | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    bands: dict[int, tuple[float, ...]] = field(default_factory=dict)
    levels: dict[float, float] = field(default_factory=dict)


@dataclass(frozen=True)
class CalibrationFile:
    """A calibration as it is written."""

    model: str
    num_images: Count
    steps: Steps
    detectors: dict[str, dict]
    run: str = ""
    revision: dict[str, str] = field(default_factory=dict)
    target_fpr: float | None = None
    negatives: int = 0
    positives: int = 0


@dataclass(frozen=True)
class Calibration:
    """Thresholds of a model's detectors; without a file, nothing is calibrated and everything is allowed.

    Attributes:
        detectors: by name.
        holds_for: the model, number of noises (``num_images``) and grid (``steps``) that it holds for.
        revision: sha256 of the parts and adapters of that model; empty in files of old, which are of no adapters.
    """

    path: Path | None = None
    detectors: dict[str, CalibratedDetector] = field(default_factory=dict)
    holds_for: dict = field(default_factory=dict)
    revision: dict[str, str] = field(default_factory=dict)

    @property
    def thresholds(self) -> dict[str, float]:
        """Detector -> score from which on a prompt is flagged."""
        return {name: one.threshold for name, one in self.detectors.items()}

    @property
    def levels(self) -> dict[str, dict[float, float]]:
        """Detector -> share of the prompts that are not memorized -> score below which that share lies."""
        return {name: one.levels for name, one in self.detectors.items() if one.levels}

    @property
    def settings(self) -> dict[str, dict]:
        """Detector -> the settings that were fitted, and those beside them."""
        return {name: one.settings for name, one in self.detectors.items() if one.settings}

    def bands(self, name: str) -> Bands:
        """The undecided bands of a detector.

        Raises:
            InputError: it has none.
        """
        if name not in self.detectors or not self.detectors[name].bands:
            where = f"{self.path} has" if self.path else "there are"
            raise InputError(f"{where} no bands for {name}; detect_eval.py --calibrate makes them, with 8 noises")
        return {n: (low, high) for n, (low, high) in self.detectors[name].bands.items()}

    def check(self, asked: Mapping[str, Any], settings: Mapping[str, Mapping] | None = None) -> None:
        """See that it holds for what was ``asked``, and for the ``settings`` asked of detectors.

        Raises:
            InputError: it holds for something else.
        """
        if not self.path:
            return
        pairs = [(key, self.holds_for.get(key), value) for key, value in asked.items()]
        for name, own in self.settings.items():
            pairs += [(key, own.get(key), value) for key, value in (settings or {}).get(name, {}).items()]
        for key, known, value in pairs:
            if known != value:
                raise InputError(f"{self.path} is for {key} = {known}, not {value}")

    def check_revision(self, revision: Mapping[str, str]) -> None:
        """See that it was made of this model: of the parts that both know, and of the same adapters at the same scales.

        Args:
            revision: of the model as it is loaded, by part.

        Raises:
            InputError: it was made of another one; names the part.
        """
        if not self.path:
            return
        for part in sorted(self.revision.keys() | revision.keys()):
            known, found = self.revision.get(part), revision.get(part)
            if known != found and (part.startswith(ADAPTER) or (known and found)):
                why = "of another" if known and found else "with" if known else "without"
                raise InputError(f"{self.path}: was made {why} {part}; make a calibration of this model, adapters and "
                                 "all: detect_mem.py, then detect_eval.py --calibrate")  # fmt: skip


def levels_of(scores: np.ndarray) -> dict[float, float]:
    """Share of the prompts that are not memorized -> the score below which it lies, from their ``scores (n,)``."""
    return {share: float(f"{np.quantile(scores, share):.5g}") for share in LEVELS}


def read_calibration(path: Path) -> Calibration:
    """Read a calibration file.

    Raises:
        InputError: it is no such file, or a field is not what it should be.
    """
    try:
        content = yaml.safe_load(read_file(path).decode())
    except (yaml.YAMLError, ValueError, RecursionError):  # UnicodeDecodeError is a ValueError
        content = None
    if not isinstance(content, dict) or "detectors" not in content:
        raise InputError(f"{path}: not a calibration file; detect_eval.py --calibrate writes them")
    return calibration_of(content, path)


def calibration_of(content: Mapping[str, Any], path: Path) -> Calibration:
    """The calibration that ``path`` holds, or is to hold.

    Raises:
        InputError: a field is not what it should be, such as a threshold that is not finite.
    """
    file = make(CalibrationFile, content, str(path))
    detectors = {name: make(CalibratedDetector, values, f"{path}: {name}") for name, values in file.detectors.items()}
    for name, one in detectors.items():
        for setting, value in one.settings.items():
            if isinstance(value, float) and not math.isfinite(value):
                raise InputError(f"{path}: {name}: {setting} = {value} is not finite")
        if one.bands and (set(one.bands) != set(ROUNDS[:-1]) or any(len(band) != 2 for band in one.bands.values())):
            raise InputError(f"{path}: {name}: bands are (low, high) for {', '.join(map(str, ROUNDS[:-1]))} noises")
    holds_for = {key: getattr(file, key) for key in ("model", "num_images", "steps")}
    return Calibration(path, detectors, holds_for, file.revision)
