"""Pipelines of other families than Stable Diffusion 1 and 2, part by part as their index names them.

As there, only whole weights in safetensors are loaded, and no code of a checkpoint is run: an index can name classes of
diffusers and transformers alone.
"""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, ModelMixin, SchedulerMixin
from diffusers.pipelines.auto_pipeline import AUTO_TEXT2IMAGE_PIPELINES_MAPPING
from transformers import CLIPTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from memorization.errors import InputError
from memorization.models.checkpoint import in_short, load_network, load_tokenizer, read_config
from memorization.models.consistency import check_autoencoder
from memorization.models.devices import DTYPES
from memorization.models.families.base import family_of
from memorization.models.families.guessed import Guessed
from memorization.models.index import load_scheduler, read_index
from memorization.models.replay import Replay, check_step

OURS = "StableDiffusionPipeline"  # loaded in loading.py
UNUSED = ("safety_checker", "feature_extractor", "image_encoder")
KINDS = (ModelMixin, PreTrainedModel, PreTrainedTokenizerBase, SchedulerMixin)


def is_other(name: str) -> bool:
    """Whether a class of diffusers makes pictures of text, and is another than Stable Diffusion 1's and 2's."""
    return name != OURS and name in {cls.__name__ for cls in AUTO_TEXT2IMAGE_PIPELINES_MAPPING.values()}


def load_other(folder: Path, dtype: str, *, pictures: bool = True, **given: Any) -> Any:
    """Load a pipeline of any family.

    Args:
        pictures: load the autoencoder too; scores of prompts do without it.
        given: parts that are there already.

    Raises:
        InputError: a part is missing, damaged, or of no class that is loaded here.
    """
    index = read_index(folder)
    cls = getattr(diffusers, index["_class_name"])
    known = inspect.signature(cls.__init__).parameters
    settings = {key: value for key, value in index.items() if key in known and not isinstance(value, list)}
    parts = {
        part: None if part == "vae" and not pictures else load_part(folder, part, named, index, DTYPES[dtype])
        for part, named in index.items()
        if part in known and part not in given and isinstance(named, list)
    }
    try:
        pipe = cls(**parts, **given, **settings)
    except Exception as error:  # whatever a class of diffusers makes of parts that are not its own
        raise InputError(f"{folder}: no {cls.__name__} can be made of its parts ({in_short(error)})") from None
    if not pictures and (folder / "vae" / "config.json").is_file():  # else it is what the pipeline's models all have
        blocks = read_config(folder / "vae" / "config.json").get("block_out_channels")
        pipe.vae_scale_factor = 2 ** (len(blocks) - 1) if blocks else pipe.vae_scale_factor
    return pipe


def replayed(pipe: Any, where: Path | str) -> Replay:
    """A pipeline as a model, once its denoiser has been called.

    Raises:
        InputError: it is of no family that is known and cannot be read without, or its parts do not work together.
    """
    try:
        family = family_of(pipe)
    except InputError:
        family = Guessed(pipe)
    try:
        made = Replay(pipe, family)
        if isinstance(family, Guessed):
            check_step(made)
        with torch.no_grad():
            made.predict_noise(made.pure_noise(1, 0), made.detection_timesteps(2)[0], made.embed([""]))
    except (InputError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # torch, diffusers and transformers each raise their own kinds
        raise InputError(f"{where}: its parts do not work together ({in_short(error)})") from None
    return made


def load_part(folder: Path, part: str, named: list, index: dict, dtype: torch.dtype) -> Any:
    """A part by the class that the index names; None where it names none, and for what is not used.

    Raises:
        InputError: as :func:`load_other`.
    """
    if named == [None, None] or part in UNUSED:
        return None
    cls = class_of(folder, part, named)
    if issubclass(cls, SchedulerMixin):
        return load_scheduler(folder, index, flows=True)
    if cls is CLIPTokenizer:
        return load_tokenizer(folder / part)
    if issubclass(cls, PreTrainedTokenizerBase):
        return load_other_tokenizer(cls, folder / part)
    network = load_network(cls, folder / part, dtype)
    if isinstance(network, AutoencoderKL):
        check_autoencoder(network, folder)
    return network


def class_of(folder: Path, part: str, named: list) -> type:
    """The class of diffusers or transformers that an index names.

    Raises:
        InputError: it names none that is loaded.
    """
    library, name = named if len(named) == 2 else (None, None)
    found = None
    if library in ("diffusers", "transformers") and isinstance(name, str):
        found = getattr(importlib.import_module(library), name, None)
    if not (isinstance(found, type) and issubclass(found, KINDS)):
        raise InputError(f"{folder}/model_index.json: {part} = {named} is no part of diffusers or transformers")
    return found


def load_other_tokenizer(cls: Any, folder: Path) -> Any:
    """A tokenizer that is not CLIP's.

    Raises:
        InputError: a file is missing or damaged, or a package that reads it is not installed.
    """
    read_config(folder / "tokenizer_config.json")
    try:
        tokenizer = cls.from_pretrained(folder, local_files_only=True)
        tokenizer("a")  # what its vocabulary lacks shows when it is used
        return tokenizer
    except BaseException as error:  # the tokenizers' panics are no Exception
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            raise
        raise InputError(f"{folder}: cannot be loaded as a {cls.__name__} ({in_short(error)})") from None
