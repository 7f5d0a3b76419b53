"""Model names -> checkpoints. A model is a name (a YAML file in memorization/configs), a folder, or a hub id."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import yaml

from memorization.paths import CONFIGS, ROOT


@dataclass(frozen=True)
class ModelSpec:
    """What ``memorization/configs/NAME.yaml`` says of a model.

    Attributes:
        ids: hub ids or folders, tried in order; ids move, so there are mirrors.
        dtype: the default dtype; None to choose by device.
        prompts: ``{"prompts": FILE}`` or ``{"memorized": FILE, "non_memorized": FILE}``.
        anisotropy: settings of the anisotropy detector (weights, branch).
        guidance_scale: of generations.
        calibration: file with its thresholds, in the project.
        clip: the CLIP checkpoint that judges its pictures.
        amg: settings of the mitigation amg.
        copy_limits: ``nl2`` -> value below which a picture counts as a copy; ``sscd`` -> above which.
        reference: folder of an index of pixels: how pictures of this kind look, for Frechet distances.
    """

    name: str
    ids: tuple[str, ...]
    dtype: str | None = None
    prompts: dict[str, str] = field(default_factory=dict)
    anisotropy: dict = field(default_factory=dict)
    guidance_scale: float = 7.5
    calibration: str | None = None
    clip: str | None = None
    copy_limits: dict[str, float] = field(default_factory=dict)
    amg: dict = field(default_factory=dict)
    reference: str | None = None
    description: str = ""


def model_names() -> list[str]:
    """Names that ``memorization/configs`` defines."""
    return sorted(path.stem for path in CONFIGS.glob("*.yaml"))


def find_model(name: str) -> ModelSpec:
    """The specification of a model name; a folder or hub id gets one with defaults."""
    path = CONFIGS / f"{name}.yaml"
    if name in model_names():
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
        values["ids"] = tuple(_in_project(identifier) for identifier in values["ids"])
        if "clip" in values:
            values["clip"] = _in_project(values["clip"])
        return ModelSpec(name=name, **values)
    return ModelSpec(name=Path(name).resolve().name, ids=(name,))


def _in_project(identifier: str) -> str:
    """The path of a folder of the project; a hub id stays as it is."""
    return str(ROOT / identifier) if (ROOT / identifier).is_dir() else identifier
