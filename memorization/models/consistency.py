"""Whether the parts of a checkpoint belong together and are what the detectors are defined on, said before any work.

Each rule is here because its breach once gave a traceback far from its cause, or a wrong number without a word.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler

from local_sd_pipeline import PREDICTION_TYPES, LocalStableDiffusionPipeline
from memorization.errors import InputError

# On disk: where a reader finds the value that a line names.
UNET, TEXT, VAE = "unet/config.json", "text_encoder/config.json", "vae/config.json"
SCHEDULER, TOKENIZER = "scheduler/scheduler_config.json", "tokenizer/tokenizer_config.json"


def check_pipeline(pipe: LocalStableDiffusionPipeline, folder: Path) -> None:
    """See that the parts of a Stable Diffusion pipeline belong together.

    Raises:
        InputError: they do not; names the file, the setting and its value.
    """
    _raise_first(_of_pipeline(pipe), folder)


def check_autoencoder(vae: Any, folder: Path) -> None:
    """See that latents can be scaled; raises as :func:`check_pipeline`."""
    _raise_first(_of_vae(vae.config), folder)


def check_pixel_model(unet: Any, scheduler: Any, folder: Path) -> None:
    """See that a pixel-space model is one that is sampled here; raises as :func:`check_pipeline`."""
    _raise_first(_of_pixel_model(unet.config, scheduler), folder)


def check_scheduler(scheduler: Any, folder: Path) -> None:
    """See that a scheduler says how noise grows in the way that detectors read; raises as :func:`check_pipeline`."""
    _raise_first(_of_scheduler(scheduler), folder)


def _raise_first(problems: Iterator[str], folder: Path) -> None:
    for problem in problems:
        raise InputError(f"{folder}/{problem}")


def _of_pipeline(pipe: LocalStableDiffusionPipeline) -> Iterator[str]:
    unet: Any = pipe.unet.config
    if unet.in_channels != unet.out_channels or unet.get("addition_embed_type") or unet.get("class_embed_type"):
        yield f"{UNET}: takes more than latents, timestep and text (inpainting, SDXL, ...)"
    if not _is_size(unet.sample_size):
        yield f"{UNET}: sample_size = {unet.sample_size!r} is no size of latents"
    width = pipe.text_encoder.config.hidden_size
    if unet.get("encoder_hid_dim") is None and unet.cross_attention_dim != width:
        yield f"{UNET}: cross_attention_dim = {unet.cross_attention_dim}, but the text encoder gives {width}"
    yield from _of_tokenizer(pipe.tokenizer, pipe.text_encoder.config)
    if pipe.vae is not None:
        yield from _of_vae(pipe.vae.config)
        if pipe.vae.config.latent_channels != unet.in_channels:
            yield f"{VAE}: latent_channels = {pipe.vae.config.latent_channels}, but the UNet's are {unet.in_channels}"


def _of_tokenizer(tokenizer: Any, text: Any) -> Iterator[str]:
    length, places = tokenizer.model_max_length, text.max_position_embeddings
    if length > places:
        yield f"{TOKENIZER}: model_max_length = {length!r} is more than the text encoder's {places} positions"
    if (known := 1 + max(tokenizer.get_vocab().values(), default=0)) > text.vocab_size:
        yield f"{TOKENIZER}: the tokenizer knows {known} tokens, the text encoder {text.vocab_size}"
    if tokenizer.pad_token_id is None or tokenizer.eos_token_id not in tokenizer("a").input_ids:
        yield f"{TOKENIZER}: ends no text with an end-of-text token"
    if set(tokenizer("a b c", add_special_tokens=False).input_ids) <= {tokenizer.unk_token_id}:
        yield f"{TOKENIZER}: the vocabulary beside it lacks all letters"


def _of_scheduler(scheduler: Any) -> Iterator[str]:
    config, name = scheduler.config, type(scheduler).__name__
    if config.get("prediction_type") not in PREDICTION_TYPES:
        yield f"{SCHEDULER}: predicts {config.get('prediction_type')!r}, not one of {', '.join(PREDICTION_TYPES)}"
    signal = getattr(scheduler, "alphas_cumprod", None)
    if not isinstance(signal, torch.Tensor):
        yield f"{SCHEDULER}: {name} is of another family than DDPM's; it has no alphas_cumprod"
        return
    if len(signal) != config.num_train_timesteps:
        yield f"{SCHEDULER}: {len(signal)} betas for num_train_timesteps = {config.num_train_timesteps}"
        return
    if not ((signal >= 0) & (signal <= 1)).all():  # NaN is neither
        yield f"{SCHEDULER}: its betas leave no share of signal between 0 and 1"
    try:
        ddim = DDIMScheduler.from_config(config).alphas_cumprod
    except Exception as error:  # whatever a value of the config does to it
        yield f"{SCHEDULER}: cannot be read as DDIM's ({error})"
        return
    if not torch.allclose(ddim.float(), signal.float(), atol=1e-6):
        yield f"{SCHEDULER}: {name} has another noise schedule than DDIM by the same config"


def _of_vae(config: Any) -> Iterator[str]:
    scale = config.scaling_factor
    if not isinstance(scale, (int, float)) or isinstance(scale, bool) or not (math.isfinite(scale) and scale > 0):
        yield f"{VAE}: scaling_factor = {scale!r} is no number above 0"


def _of_pixel_model(unet: Any, scheduler: Any) -> Iterator[str]:
    if not is_count(unet.sample_size):
        yield f"{UNET}: sample_size = {unet.sample_size!r} is no side of square pictures"
    if unet.in_channels != unet.out_channels:
        yield f"{UNET}: gives {unet.out_channels} channels of {unet.in_channels}; learned variances are not read"
    if scheduler.config.get("prediction_type") != "epsilon":
        yield f"{SCHEDULER}: predicts {scheduler.config.get('prediction_type')!r}, not epsilon"


def is_count(value: Any) -> bool:
    """Whether a value of a config is a whole number above 0, and not text that looks like one."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_size(value: Any) -> bool:
    pair = isinstance(value, (list, tuple)) and len(value) == 2
    return all(map(is_count, value)) if pair else is_count(value)
