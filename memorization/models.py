"""Model names -> checkpoints. A model is a name (a YAML file in ``configs/``), a folder, or a hub id."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path

import torch
import yaml
from diffusers import AutoencoderKL

from local_sd_pipeline import PREDICTION_TYPES, LocalStableDiffusionPipeline
from memorization.errors import InputError

ROOT = Path(__file__).parent.parent
CONFIGS = ROOT / "configs"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class ModelSpec:
    """What ``configs/NAME.yaml`` says of a model.

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
    """Names that ``configs/`` defines."""
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


def pick_device(name: str = "auto") -> torch.device:
    """``auto`` is CUDA where there is one, else the CPU."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(f"device {name!r} cannot be used: {str(error).splitlines()[0]}") from None
    return device


def pick_dtype(name: str | None, device: torch.device) -> str:
    """The dtype asked for, or bfloat16 where the hardware has it; else float16 on CUDA, float32 on a CPU."""
    if name:
        return name
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
    has = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    return "bfloat16" if has.get("avx512_bf16") or has.get("amx_bf16") else "float32"


def load_pipeline(
    spec: ModelSpec, dtype: str, device: torch.device, *, images: bool = False
) -> LocalStableDiffusionPipeline:
    """Load a checkpoint, from safetensors only.

    Args:
        images: load the autoencoder too; detection does without it.

    Raises:
        InputError: nothing by that name, the hub cannot be reached, or the checkpoint lacks what is needed.
    """
    unused = dict.fromkeys(["safety_checker", "feature_extractor", "image_encoder", *([] if images else ["vae"])])
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
