"""Loading checkpoints by name, YAML file, folder or hub id: pipelines and autoencoders.

Stable Diffusion 1 and 2 here; pipelines of other families in pipelines.py, which :func:`load_model` goes to.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, DDPMPipeline, DiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextModel

from local_sd_pipeline import LocalStableDiffusionPipeline
from memorization.errors import InputError
from memorization.io.files import sha256_of
from memorization.models.base import TextToImage
from memorization.models.checkpoint import (
    fetch_part,
    find_folder,
    identity_of,
    load_network,
    load_tokenizer,
)
from memorization.models.consistency import check_autoencoder, check_pipeline, check_scheduler
from memorization.models.devices import DTYPES, pick_device, pick_dtype
from memorization.models.gguf import load_gguf, parts_for
from memorization.models.index import check_named, digest_of_settings, load_scheduler, read_index
from memorization.models.lora import put_on
from memorization.models.offload import Offload, check_offload, put
from memorization.models.pipelines import UNUSED, is_other, load_other, replayed
from memorization.models.single import configs_for, load_single, single_file
from memorization.models.spec import ModelSpec, find_model, model_names

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
        offload: where its networks wait, as :mod:`~memorization.models.offload` has it.
    """

    name: str
    spec: ModelSpec
    pipe: Any  # a TextToImage; untyped, since what is for Stable Diffusion 1 and 2 alone takes it as its pipeline
    dtype: str
    offload: Offload = "none"

    @property
    def where(self) -> dict[str, str]:
        """Where it computes, which a run notes and no score depends on."""
        return {"device": str(self.pipe.device), **({} if self.offload == "none" else {"offload": self.offload})}


def load_model(
    name: str, *, device: str = "auto", dtype: str | None = None, pictures: bool = True, any_family: bool = False,
    config: str | None = None, adapters: Sequence[tuple[Path, float]] = (), offload: Offload = "none",
) -> Model:  # fmt: skip
    """Load a model by its name, YAML file, folder or hub id.

    Args:
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:1``, ...
        dtype: None for the model's own, else by hardware.
        pictures: load the autoencoder too; scores of prompts do without it.
        any_family: take pipelines of other families than Stable Diffusion 1 and 2.
        config: folder or hub id of the configs of a model that is one file, and of the other parts where that is a
            GGUF; None for the spec's, or for what diffusers finds without a network.
        adapters: LoRAs to put on, each at a scale.
        offload: ``model`` or ``group`` for a model that does not fit the device.

    Raises:
        InputError: there is no such model or device, the hub cannot be reached, the checkpoint lacks what is needed, or
            it does not fit the device.
    """
    spec, place = find_model(name), pick_device(device)
    check_offload(offload, place)
    dtype = pick_dtype(dtype or spec.dtype, place)
    file = single_file(spec.ids)
    if config and not file:
        raise InputError(f"--config {config}: goes with a model that is one file")
    quantized = file if file and file.suffix == ".gguf" else None
    find = parts_for if quantized else configs_for
    folder = find(file, config or spec.config) if file else find_checkpoint(spec, pictures)
    index = read_index(folder)
    named = index["_class_name"]
    other = is_other(named)
    if other and not any_family:
        raise InputError(f"{folder}: a {named}; this command is for Stable Diffusion 1 and 2 alone")
    if quantized:
        pipe = load_gguf(quantized, folder, dtype, pictures=pictures)
    elif file:
        whole = load_single(file, folder, DTYPES[dtype])
        pipe = whole if other else as_ours(whole, folder)
    else:
        pipe = (load_other if other else load_parts)(folder, dtype, pictures=pictures)
    put_on(pipe, adapters)
    try:
        ready(pipe, folder, dtype, place, offload)
        made = replayed(pipe, folder) if other else pipe
    except torch.OutOfMemoryError:
        raise InputError(f"{folder}: does not fit into the memory of {place}; try --offload model, or group") from None
    made.files = {"file": sha256_of(file)} if file else {}
    made.files |= {"settings": digest_of_settings(index)} if other else {}
    made.files |= {f"lora {i} at {scale:g}": sha256_of(path) for i, (path, scale) in enumerate(adapters, 1)}
    if other and spec.guidance_scale is None:  # nothing else is known: its pipeline says how it is guided
        spec = replace(spec, guidance_scale=made.guidance_scale)
    return Model(name, spec, made, dtype, offload)


def as_ours(pipe: Any, folder: Path) -> LocalStableDiffusionPipeline:
    """A pipeline of Stable Diffusion 1 or 2 with its predictions laid open, once its parts are seen to belong together.

    Raises:
        InputError: they do not.
    """
    ours = LocalStableDiffusionPipeline(**pipe.components, requires_safety_checker=False)
    check_pipeline(ours, folder)
    check_scheduler(ours.scheduler, folder)
    return ours


def ready(pipe: Any, folder: Path, dtype: str, device: torch.device, offload: Offload = "none") -> None:
    """Note where a pipeline comes from, and put it where it is used."""
    pipe.register_to_config(_name_or_path=str(folder))
    if dtype == "float32":
        torch.backends.cudnn.allow_tf32 = False  # float32 means float32 on CUDA too
    pipe.set_progress_bar_config(disable=True)
    if hasattr(pipe, "unet") and offload != "group":  # whose copies of the weights keep a format for good
        pipe.unet.to(memory_format=torch.channels_last)
    put(pipe, device, offload)


def pipeline_of(model: Model) -> Any:
    """The pipeline of diffusers that a model is made of, whatever its family."""
    return getattr(model.pipe, "pipe", model.pipe)


def find_checkpoint(spec: ModelSpec, pictures: bool) -> Path:
    """The folder of a model's checkpoint.

    Raises:
        InputError: nothing by that name, or the hub cannot be reached.
    """
    unused: dict[str, Any] = dict.fromkeys(UNUSED if pictures else (*UNUSED, "vae"))

    def fetch(identifier: str) -> Any:
        return DiffusionPipeline.download(identifier, use_safetensors=True, **unused)

    known = ", ".join(model_names())
    return find_folder(spec.ids, fetch, f". Names: {known}; or give a YAML file, folder or hub id")


def load_pipeline(
    spec: ModelSpec, dtype: str, device: torch.device, *, pictures: bool = False
) -> LocalStableDiffusionPipeline:
    """Load a checkpoint of Stable Diffusion 1 or 2 by its name; raises as :func:`load_parts`."""
    folder = find_checkpoint(spec, pictures)
    pipe = load_parts(folder, dtype, pictures=pictures)
    ready(pipe, folder, dtype, device)
    return pipe


def load_parts(folder: Path, dtype: str, *, pictures: bool = False) -> LocalStableDiffusionPipeline:
    """Load a checkpoint, part by part: only whole weights in safetensors, and no code of its own.

    Args:
        pictures: load the autoencoder too; detection does without it.

    Raises:
        InputError: nothing by that name, the hub cannot be reached, or a part is missing, damaged or does not belong.
    """
    unused = UNUSED if pictures else (*UNUSED, "vae")
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
    check_pipeline(pipe, folder)
    return pipe


def with_scheduler(pipe: Any, name: str) -> None:
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


def folder_of(pipe: TextToImage | DDPMPipeline) -> Path:
    """Where a pipeline was loaded from."""
    return Path(pipe.config["_name_or_path"])


def revision_of(pipe: TextToImage | DDPMPipeline, *, pictures: bool) -> dict[str, str]:
    """What tells a checkpoint from every other: the sha256 of all that scores depend on, by part.

    Args:
        pictures: they depend on the autoencoder too.
    """
    parts = getattr(pipe, "shaping", None) or [
        part for part in ("unet", "text_encoder", "tokenizer", "scheduler", "vae") if hasattr(pipe, part)
    ]
    found = identity_of(folder_of(pipe), [part for part in parts if part != "vae" or pictures])
    return {**found, **getattr(pipe, "files", {})}
