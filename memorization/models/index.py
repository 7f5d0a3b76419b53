"""The index of a diffusers checkpoint, and its scheduler: what all kinds of pipelines have alike."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import diffusers
from diffusers import FlowMatchEulerDiscreteScheduler, SchedulerMixin

from memorization.errors import InputError
from memorization.models.checkpoint import in_short, parameters_of, read_config, read_named
from memorization.models.consistency import check_scheduler, is_count


def read_index(folder: Path) -> dict:
    """What a pipeline's ``model_index.json`` says.

    Raises:
        InputError: there is none, or it names code of its own.
    """
    path = folder / "model_index.json"
    if not path.is_file():
        raise InputError(f"{folder}: no model_index.json in this folder; it is no diffusers checkpoint")
    index = read_config(path)
    if not isinstance(index.get("_class_name"), str):
        raise InputError(f"{path}: _class_name = {index.get('_class_name')} names no class of diffusers")
    return index


def digest_of_settings(index: dict) -> str:
    """The sha256 of what an index says beside parts, such as what stands for no prompt; not of who wrote it."""
    said = {key: value for key, value in index.items() if not key.startswith("_") and not isinstance(value, list)}
    return f"sha256:{hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()}"


def check_named(folder: Path, index: dict, part: str, classes: Collection[str]) -> None:
    """See that the index of a pipeline names one of ``classes`` of diffusers or transformers for a part.

    Raises:
        InputError: it names none, or something else, such as code of its own.
    """
    named = index.get(part)
    if named not in [[library, name] for library in ("diffusers", "transformers") for name in classes]:
        known = next(iter(classes)) if len(classes) <= 2 else f"{part} of diffusers"
        raise InputError(f"{folder}/model_index.json: {part} = {named} is no {known}")


def load_scheduler(folder: Path, index: dict, flows: bool = False) -> Any:
    """The scheduler that the index of a pipeline names.

    Args:
        flows: take those of flows too.

    Raises:
        InputError: it is none of diffusers' or of another family, or its config is missing or damaged.
    """
    check_named(folder, index, "scheduler", [name for name in dir(diffusers) if name.endswith("Scheduler")])
    path, cls = folder / "scheduler" / "scheduler_config.json", getattr(diffusers, index["scheduler"][1])
    if not (isinstance(cls, type) and issubclass(cls, SchedulerMixin)):
        raise InputError(f"{path}: {cls.__name__} is no scheduler that works here; does it need a package more?")
    config = read_named(path, cls, parameters_of(cls))
    if "_class_name" not in config:
        raise InputError(f"{path}: names no class; it is no scheduler's config")
    trained = config.get("num_train_timesteps", 1000)
    if not is_count(trained):
        raise InputError(f"{path}: num_train_timesteps = {trained!r} is no number of timesteps")
    try:
        scheduler = cls.from_pretrained(path.parent, local_files_only=True)
    except Exception as error:  # whatever a value of the config does to the scheduler
        raise InputError(f"{path}: no {cls.__name__} can be made of it ({in_short(error)})") from None
    if not (flows and isinstance(scheduler, FlowMatchEulerDiscreteScheduler)):
        check_scheduler(scheduler, folder)
    return scheduler
