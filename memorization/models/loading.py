"""Loading checkpoints: pipelines and autoencoders, from safetensors only."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from diffusers import AutoencoderKL

from local_sd_pipeline import PREDICTION_TYPES, LocalStableDiffusionPipeline
from memorization.errors import InputError
from memorization.models.devices import DTYPES
from memorization.models.registry import ModelSpec, find_model, model_names


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
        if local and not (folder / "model_index.json").is_file():
            raise InputError(f"{identifier}: no model_index.json in this folder; it is no diffusers checkpoint")
        try:
            if not local:
                folder = Path(LocalStableDiffusionPipeline.download(identifier, use_safetensors=True, **unused))
            pipe = LocalStableDiffusionPipeline.from_pretrained(
                folder, dtype=DTYPES[dtype], use_safetensors=True, local_files_only=True, **unused
            )
        except Exception as error:  # diffusers, the hub client and safetensors each raise their own kinds
            reasons.append((identifier, local, error))
            continue
        return _place(pipe, device)
    raise InputError(_why_not_loaded(spec, reasons))


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


def _why_not_loaded(spec: ModelSpec, reasons: list[tuple[str, bool, Exception]]) -> str:
    parts = []
    for identifier, local, error in reasons:
        text = " ".join(str(error).split())[:200]
        if local:
            parts.append(f"{identifier}: cannot be loaded as a Stable Diffusion checkpoint in safetensors ({text})")
        else:
            parts.append(f"{identifier}: no folder, and the hub does not give it ({type(error).__name__}: {text})")
    return f"model {spec.name!r}: {'; '.join(parts)}. Names: {', '.join(model_names())}; or give a folder or hub id"


def revision_of(pipe: LocalStableDiffusionPipeline) -> str:
    """What tells a checkpoint from its later versions: the hub's commit, or the sha256 of a folder's UNet files."""
    folder = Path(pipe.config["_name_or_path"])
    if folder.parent.name == "snapshots":
        return folder.name
    digest = hashlib.sha256()
    for path in sorted((folder / "unet").glob("*.safetensors")):
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return f"sha256:{digest.hexdigest()}"
