"""Loading checkpoints: pipelines and autoencoders, from safetensors only."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDPMPipeline, DiffusionPipeline

from local_sd_pipeline import PREDICTION_TYPES, LocalStableDiffusionPipeline
from memorization.errors import InputError
from memorization.models.devices import DTYPES, pick_device, pick_dtype
from memorization.models.spec import ModelSpec, find_model, model_names
from memorization.paths import ROOT


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
    """Load a checkpoint, from safetensors only.

    Args:
        pictures: load the autoencoder too; detection does without it.

    Raises:
        InputError: nothing by that name, the hub cannot be reached, or the checkpoint lacks what is needed.
    """
    unused = dict.fromkeys(["safety_checker", "feature_extractor", "image_encoder", *([] if pictures else ["vae"])])
    unused["requires_safety_checker"] = False
    reasons = []
    for identifier in spec.ids:
        folder = Path(identifier)
        local = folder.is_dir()
        if not local and (folder.is_absolute() or identifier.count("/") > 1):
            where = (
                "" if (ROOT / "testbed").is_dir() else "; the shipped models lie in the repository, not in the package"
            )
            reasons.append(f"{identifier}: no such folder{where}")
            continue
        if local and not (folder / "model_index.json").is_file():
            raise InputError(f"{identifier}: no model_index.json in this folder; it is no diffusers checkpoint")
        try:
            if not local:
                folder = Path(LocalStableDiffusionPipeline.download(identifier, use_safetensors=True, **unused))
            pipe = LocalStableDiffusionPipeline.from_pretrained(
                folder, dtype=DTYPES[dtype], use_safetensors=True, local_files_only=True, **unused
            )
        except Exception as error:  # diffusers, the hub client and safetensors each raise their own kinds
            reasons.append(_why_not(identifier, local, error))
            continue
        return _place(pipe, device)
    known = ", ".join(model_names())
    raise InputError(
        f"model {spec.name!r}: {'; '.join(reasons)}. Names: {known}; or give a YAML file, folder or hub id"
    )


def load_autoencoder(identifier: str) -> AutoencoderKL:
    """The autoencoder of a Stable Diffusion checkpoint, float32, its weights frozen.

    Args:
        identifier: a name, folder or hub id.

    Raises:
        InputError: it cannot be loaded.
    """
    reasons = []
    for folder in find_model(identifier).ids:
        try:
            vae = AutoencoderKL.from_pretrained(
                folder,
                subfolder="vae",
                dtype=torch.float32,
                use_safetensors=True,
                local_files_only=Path(folder).is_dir(),
            )
            return vae.eval().requires_grad_(False)
        except Exception as error:  # diffusers, the hub client and safetensors each raise their own kinds
            reasons.append(" ".join(str(error).split())[:200])
    raise InputError(f"{identifier}: no autoencoder in safetensors that can be loaded ({'; '.join(reasons)})")


def _place(pipe: LocalStableDiffusionPipeline, device: torch.device) -> LocalStableDiffusionPipeline:
    """The pipeline on its device, its weights frozen: gradients reach embeddings and latents, never weights."""
    unet, predicts = pipe.unet.config, pipe.scheduler.config.prediction_type
    if unet.in_channels != unet.out_channels or unet.get("addition_embed_type") or unet.get("class_embed_type"):
        raise InputError("the checkpoint's UNet takes more than latents, timestep and text (inpainting, SDXL, ...)")
    if predicts not in PREDICTION_TYPES:
        raise InputError(f"the checkpoint predicts {predicts!r}, not one of {', '.join(PREDICTION_TYPES)}")
    if pipe.unet.dtype == torch.float32:
        torch.backends.cudnn.allow_tf32 = False  # float32 means float32 on CUDA too
    pipe.set_progress_bar_config(disable=True)
    pipe.to(device)
    pipe.unet.to(memory_format=torch.channels_last).eval().requires_grad_(False)
    pipe.text_encoder.eval().requires_grad_(False)
    if pipe.vae is not None:
        pipe.vae.eval().requires_grad_(False)
    return pipe


def _why_not(identifier: str, local: bool, error: Exception) -> str:
    text = " ".join(str(error).split())[:200]
    if local:
        return f"{identifier}: cannot be loaded as a Stable Diffusion checkpoint in safetensors ({text})"
    return f"{identifier}: no folder, and the hub does not give it ({type(error).__name__}: {text})"


def revision_of(pipe: DiffusionPipeline | DDPMPipeline) -> str:
    """What tells a checkpoint from its later versions: the hub's commit, or the sha256 of a folder's UNet files."""
    folder = Path(pipe.config["_name_or_path"])
    if folder.parent.name == "snapshots":
        return folder.name
    digest = hashlib.sha256()
    for path in sorted((folder / "unet").glob("*.safetensors")):
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return f"sha256:{digest.hexdigest()}"
