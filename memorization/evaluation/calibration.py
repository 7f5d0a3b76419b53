"""What ``detect_eval.py --calibrate`` wrote: the settings that were fitted and the thresholds that hold for them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import yaml

from memorization.errors import InputError


@dataclass(frozen=True)
class Calibration:
    """Thresholds of a model's detectors.

    Attributes:
        anisotropy: settings of the anisotropy detector.
        thresholds: detector -> score from which on a prompt is flagged.
        bands: detector -> noises -> undecided band, where it was made with 8 noises.
        levels: detector -> share of the prompts that are not memorized -> score below which that share lies.
        holds_for: the model, number of noises and grid that it holds for.
    """

    path: Path | None = None
    anisotropy: dict = field(default_factory=dict)
    thresholds: dict[str, float] = field(default_factory=dict)
    bands: dict[str, dict] = field(default_factory=dict)
    levels: dict[str, dict[float, float]] = field(default_factory=dict)
    holds_for: dict = field(default_factory=dict)

    def check(self, asked: dict) -> None:
        """Raises:
        InputError: it holds for something else than ``asked``.
        """
        known = {**self.anisotropy, **self.holds_for}
        for key, value in asked.items():
            if self.path and known.get(key) != value:
                raise InputError(f"{self.path} is for {key} = {known.get(key)}, not {value}")


def read_calibration(path: Path) -> Calibration:
    """Read a calibration file.

    Raises:
        InputError: it is no such file.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        detectors = content["detectors"]
        return Calibration(
            path,
            dict(detectors.get("anisotropy", {}).get("settings", {})),
            {name: float(values["threshold"]) for name, values in detectors.items()},
            {name: values["bands"] for name, values in detectors.items() if "bands" in values},
            {name: dict(values["levels"]) for name, values in detectors.items() if "levels" in values},
            {key: content[key] for key in ("model", "num_images", "steps")},
        )
    except (OSError, yaml.YAMLError, UnicodeDecodeError, KeyError, TypeError, AttributeError, ValueError):
        raise InputError(f"{path}: not a calibration file; detect_eval.py --calibrate writes them") from None
