"""Loading checkpoints by name, YAML file, folder or hub id: pipelines and autoencoders."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, DDPMPipeline, SchedulerMixin, UNet2DConditionModel
from transformers import CLIPTextModel

from local_sd_pipeline import LocalStableDiffusionPipeline
from memorization.errors import InputError
from memorization.models.checkpoint import (
    fetch_part,
    find_folder,
    identity_of,
    in_short,
    load_network,
    load_tokenizer,
    parameters_of,
    read_config,
    read_named,
)
from memorization.models.consistency import check_autoencoder, check_pipeline, check_scheduler, is_count
from memorization.models.devices import DTYPES, pick_device, pick_dtype
from memorization.models.spec import ModelSpec, find_model, model_names

UNUSED = ("safety_checker", "feature_extractor", "image_encoder")
CLASSES = {  # part -> classes that its index may name, the first of which is loaded
    "unet": ("UNet2DConditionModel",),
    "text_encoder": ("CLIPTextModel",),
    "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast"),
    "vae": ("AutoencoderKL",),
}


@dataclass(frozen=True)
class Model:
    """A model that is loaded.

    Attributes:
        name: as it was asked for; a run's settings keep it.
        dtype: of the UNet and text encoder.
    """

    name: str
    spec: ModelSpec
    pipe: LocalStableDiffusionPipeline
    dtype: str


def load_model(name: str, *, device: str = "auto", dtype: str | None = None, pictures: bool = True) -> Model:
    """Load a model by its name, YAML file, folder or hub id.

    Args:
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:1``, ...
        dtype: None for the model's own, else by hardware.
        pictures: load the autoencoder too; scores of prompts do without it.

    Raises:
        InputError: there is no such model or device, the hub cannot be reached, or the checkpoint lacks what is needed.
    """
    spec, place = find_model(name), pick_device(device)
    dtype = pick_dtype(dtype or spec.dtype, place)
    return Model(name, spec, load_pipeline(spec, dtype, place, pictures=pictures), dtype)


def load_pipeline(
    spec: ModelSpec, dtype: str, device: torch.device, *, pictures: bool = False
) -> LocalStableDiffusionPipeline:
    """Load a checkpoint, part by part: only whole weights in safetensors, and no code of its own.

    Args:
        pictures: load the autoencoder too; detection does without it.

    Raises:
        InputError: nothing by that name, the hub cannot be reached, or a part is missing, damaged or does not belong.
    """
    unused: dict[str, Any] = dict.fromkeys(UNUSED if pictures else (*UNUSED, "vae"))

    def fetch(identifier: str) -> str:
        return LocalStableDiffusionPipeline.download(identifier, use_safetensors=True, **unused)

    known = ", ".join(model_names())
    folder = find_folder(spec.ids, fetch, f". Names: {known}; or give a YAML file, folder or hub id")
    index, number = read_index(folder), DTYPES[dtype]
    for part, classes in CLASSES.items():
        if part not in unused:
            check_named(folder, index, part, classes)
    pipe = LocalStableDiffusionPipeline(  # the small parts first: what is wrong with them is said at once
        scheduler=load_scheduler(folder, index), tokenizer=load_tokenizer(folder / "tokenizer"),
        text_encoder=load_network(CLIPTextModel, folder / "text_encoder", number),
        vae=load_network(AutoencoderKL, folder / "vae", number) if pictures else None,
        unet=load_network(UNet2DConditionModel, folder / "unet", number),
        **dict.fromkeys(UNUSED), requires_safety_checker=False,
    )  # fmt: skip
    pipe.register_to_config(_name_or_path=str(folder))
    check_pipeline(pipe, folder)
    if dtype == "float32":
        torch.backends.cudnn.allow_tf32 = False  # float32 means float32 on CUDA too
    pipe.set_progress_bar_config(disable=True)
    pipe.to(device)
    pipe.unet.to(memory_format=torch.channels_last)
    return pipe


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


def check_named(folder: Path, index: dict, part: str, classes: Collection[str]) -> None:
    """See that the index of a pipeline names one of ``classes`` of diffusers or transformers for a part.

    Raises:
        InputError: it names none, or something else, such as code of its own.
    """
    named = index.get(part)
    if named not in [[library, name] for library in ("diffusers", "transformers") for name in classes]:
        known = next(iter(classes)) if len(classes) <= 2 else f"{part} of diffusers"
        raise InputError(f"{folder}/model_index.json: {part} = {named} is no {known}")


def load_scheduler(folder: Path, index: dict) -> Any:
    """The scheduler that the index of a pipeline names.

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
    check_scheduler(scheduler, folder)
    return scheduler


def with_scheduler(pipe: LocalStableDiffusionPipeline, name: str) -> None:
    """Give a pipeline another scheduler of diffusers, with the settings of its own.

    Raises:
        InputError: there is none of that name that the pipeline can take.
    """
    known = [cls.__name__ for cls in pipe.scheduler.compatibles]
    if name not in known:
        raise InputError(f"--scheduler {name}: is not one of {', '.join(sorted(known))}")
    pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config)


def load_autoencoder(identifier: str) -> tuple[AutoencoderKL, Path]:
    """The autoencoder of a Stable Diffusion checkpoint, float32, its weights frozen, and the checkpoint's folder.

    Args:
        identifier: a name, folder or hub id.

    Raises:
        InputError: it cannot be loaded.
    """
    stem = "diffusion_pytorch_model"
    folder = find_folder(find_model(identifier).ids, lambda name: fetch_part(name, "vae/", stem))
    vae = load_network(AutoencoderKL, folder / "vae")
    check_autoencoder(vae, folder)
    return vae, folder


def folder_of(pipe: LocalStableDiffusionPipeline | DDPMPipeline) -> Path:
    """Where a pipeline was loaded from."""
    return Path(pipe.config["_name_or_path"])


def revision_of(pipe: LocalStableDiffusionPipeline | DDPMPipeline, *, pictures: bool) -> dict[str, str]:
    """What tells a checkpoint from every other: the sha256 of all that scores depend on, by part.

    Args:
        pictures: they depend on the autoencoder too.
    """
    parts = [part for part in ("unet", "text_encoder", "tokenizer", "scheduler") if hasattr(pipe, part)]
    return identity_of(folder_of(pipe), [*parts, *(["vae"] if pictures and hasattr(pipe, "vae") else [])])
