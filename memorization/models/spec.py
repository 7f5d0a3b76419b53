"""What is known of a model: its checkpoints, prompts and settings, by its name, a YAML file, a folder or a hub id."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from memorization.errors import InputError
from memorization.paths import CONFIGS, ROOT
from memorization.registry import Registry
from memorization.settings import Checked, NotNegative, fitted, make

GUIDANCE = 7.5  # of Stable Diffusion 1 and 2, where nothing else is said
FILES = ("clip", "calibration", "reference", "config")  # fields of a file or folder; clip and config may be hub ids


@dataclass(frozen=True)
class ModelSpec(Checked):
    """What ``memorization/configs/NAME.yaml``, or a YAML file of the user's, says of a model.

    Files are given relative to the YAML file or to the project, and hold absolute paths here where they are there.

    Attributes:
        ids: hub ids or folders, tried in order; ids move, so there are mirrors.
        config: folder or hub id of the configs of a checkpoint that is one file, and of the other parts of a GGUF.
        dtype: the default dtype; None to choose by device.
        prompts: ``{"prompts": FILE}`` or ``{"memorized": FILE, "non_memorized": FILE}``.
        settings: of methods, where they are not the methods' own: ``{"detectors": {name: {...}}, "mitigations": ...}``.
            A detector and a mitigation may have the same name.
        guidance_scale: of generations; None for the pipeline's own, which a model that is loaded has.
        calibration: file with its thresholds, written by detect_eval.py --calibrate.
        clip: the CLIP checkpoint that judges its pictures.
        copy_limits: measure of similarity/judge.py -> the value at which a picture counts as a copy; the first decides.
        reference: folder of an index of pixels: how pictures of this kind look, for Frechet distances.
    """

    name: str
    ids: tuple[str, ...]
    config: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    prompts: dict[Literal["prompts", "memorized", "non_memorized"], str] = field(default_factory=dict)
    settings: dict[Literal["detectors", "mitigations"], dict[str, dict]] = field(default_factory=dict)
    guidance_scale: NotNegative | None = None
    calibration: str | None = None
    clip: str | None = None
    copy_limits: dict[str, float] = field(default_factory=dict)
    reference: str | None = None
    description: str = ""

    @property
    def scale(self) -> float:
        """Of generations; where nothing is said and no model is loaded, that of Stable Diffusion 1 and 2."""
        return GUIDANCE if self.guidance_scale is None else self.guidance_scale

    def settings_of(self, kind: Literal["detectors", "mitigations"], methods: Registry) -> dict[str, dict]:
        """Method -> its settings, checked whether or not it is used.

        Raises:
            InputError: there is no such method or setting, or a value makes no sense.
        """
        known = self.settings.get(kind, {}).items()
        return {name: fitted(methods.find(name), values, f"model {self.name}: {name}") for name, values in known}

    def lists(self) -> dict[str, Path]:
        """Role -> file of its prompt lists.

        Raises:
            InputError: it has none, or a file is not there.
        """
        found: dict[str, Path] = {role: Path(file) for role, file in self.prompts.items()}
        if not found:
            raise InputError(f"model {self.name!r} has no prompt list of its own: give --prompts FILE")
        if missing := [path for path in found.values() if not path.exists()]:
            made_by = "memorization.prompts fetch" if "published" in missing[0].parts else "testbed.verify"
            raise InputError(f"{missing[0]}: not there yet; it comes from python -m {made_by}")
        return found

    def own_list(self) -> Path | None:
        """Its list of prompts with labels and training pictures, if it has one."""
        return Path(self.prompts["prompts"]) if "prompts" in self.prompts else None


def model_names() -> list[str]:
    """Names that ``memorization/configs`` defines."""
    return sorted(path.stem for path in CONFIGS.glob("*.yaml"))


def find_model(name: str) -> ModelSpec:
    """What is known of a model.

    Args:
        name: one of :func:`model_names`, a YAML file, a folder of a checkpoint, or a hub id. Of the last two only the
            name is known.

    Raises:
        InputError: the YAML file says something else than a :class:`ModelSpec` holds.
    """
    if name in model_names():
        return read_spec(CONFIGS / f"{name}.yaml", ROOT)
    if Path(name).suffix in (".yaml", ".yml"):
        return read_spec(Path(name), Path(name).resolve().parent)
    return ModelSpec(name=Path(name).resolve().name, ids=(name,))


def read_spec(path: Path, home: Path) -> ModelSpec:
    """A model's YAML file.

    Args:
        home: what its files are relative to.

    Raises:
        InputError: it is no such file.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"{path}: cannot be read ({' '.join(str(error).split())[:200]})") from None
    if not isinstance(values, Mapping):
        raise InputError(f"{path}: says nothing of a model; it needs ids: [FOLDER or HUB_ID]")
    spec = make(ModelSpec, {"name": path.stem, **values}, str(path))
    found: dict[str, Any] = {key: _placed(value, home) for key in FILES if (value := getattr(spec, key))}
    found["ids"] = tuple(_placed(identifier, home) for identifier in spec.ids)
    found["prompts"] = {role: str(home / file) for role, file in spec.prompts.items()}
    return make(ModelSpec, {**vars(spec), **found}, str(path))


def _placed(name: str, home: Path) -> str:
    """The path of a file or folder; a hub id, which has one slash at most, stays as it is where there is none."""
    here = home / name
    return str(here) if here.exists() or name.count("/") > 1 or Path(name).is_absolute() else name
