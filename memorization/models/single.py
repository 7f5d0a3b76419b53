"""A checkpoint in one file, as trainers and exchanges of models have it: read by diffusers, with configs of a folder.

Only safetensors (gguf.py has GGUF); the configs say what the file holds, and come from a folder, or from the cache of
the hub client where diffusers knows which checkpoint is of the same shape.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL
from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES
from diffusers.loaders.single_file_utils import (
    LDM_VAE_KEYS,
    fetch_diffusers_config,
    is_clip_model_in_single_file,
    is_t5_in_single_file,
)
from huggingface_hub import snapshot_download
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel, T5EncoderModel

from memorization.errors import InputError
from memorization.io.files import read_file
from memorization.models.checkpoint import find_folder, in_short, read_config
from memorization.models.index import read_index
from memorization.models.pipelines import OURS, UNUSED, class_of, is_other, load_part

PICKLES = (".ckpt", ".bin", ".pt", ".pth")
SCALES = (".scale_weight", ".weight_scale")  # of eight-bit weights, which diffusers reads without them
CONFIGS = ("*.json", "*.txt", "*/*.json", "*/*.txt", "*/*.model")  # of a checkpoint on the hub, without its weights


def single_file(identifiers: tuple[str, ...]) -> Path | None:
    """The one file that a model is, if it is one.

    Raises:
        InputError: it is a pickle, which can hold code, or there is no such file.
    """
    for name in identifiers:
        path = Path(name)
        if path.suffix in PICKLES and not path.is_dir():
            raise InputError(f"{path}: may be a pickle, which can run code; only safetensors and GGUF are loaded")
        if path.suffix in (".safetensors", ".gguf"):
            if not path.is_file():
                raise InputError(f"{path}: no such file")
            return path
    return None


def shapes_of(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a file without their numbers.

    Raises:
        InputError: it is no whole file in safetensors.
    """
    read_file(path)  # says what is wrong with the file itself
    try:
        with safe_open(path, "pt") as file:
            return {key: torch.empty(file.get_slice(key).get_shape(), device="meta") for key in file.keys()}  # noqa: SIM118
    except Exception as error:  # safetensors raises its own kinds
        raise InputError(f"{path}: no whole file in safetensors ({in_short(error)})") from None


def configs_for(path: Path, config: str | None) -> Path:
    """The folder of configs: the one that is named, else of the checkpoint whose shape diffusers sees in the file.

    Raises:
        InputError: it is not there.
    """

    def fetch(identifier: str, local: bool = False) -> str:
        return str(snapshot_download(identifier, allow_patterns=list(CONFIGS), local_files_only=local))

    shapes = shapes_of(path)
    if config is not None:
        return find_folder([config], fetch)
    known = fetch_diffusers_config(shapes)["pretrained_model_name_or_path"]
    try:
        return Path(fetch(known, local=True))
    except Exception:  # the hub client raises its own kinds
        raise InputError(
            f"{path}: looks like {known}, whose configs are not on this machine; name a folder in diffusers format, or "
            f"a hub id, of the same architecture: --config {known}"
        ) from None


def load_single(path: Path, folder: Path, dtype: torch.dtype) -> Any:
    """A pipeline of diffusers from one file; what the file has not comes from the folder of configs.

    Raises:
        InputError: the configs are of no pipeline that makes pictures of text or that diffusers reads from one file, or
            do not belong to the file; or its weights are quantized.
    """
    index = read_index(folder)
    name = index["_class_name"]
    if name != OURS and not is_other(name):
        raise InputError(f"{folder}: a {name} makes no pictures of text")
    cls = getattr(diffusers, name)
    if not hasattr(cls, "from_single_file"):
        raise InputError(f"{path}: diffusers reads no {name} from one file; give its folder in diffusers format")
    known = inspect.signature(cls.__init__).parameters
    held = shapes_of(path)
    if scales := [key for key in held if key.endswith(SCALES)]:
        raise InputError(f"{path}: holds {scales[0]}: quantized weights are read from GGUF alone")
    given: dict[str, Any] = {part: None for part in UNUSED if part in known}
    for part, named in index.items():
        if part in known and part not in given and isinstance(named, list):
            if named != [None, None]:
                _check_part(folder, part, named)
                if _is_held(class_of(folder, part, named), held):
                    continue
            given[part] = load_part(folder, part, named, index, dtype)  # diffusers would fill up what lacks at random
    try:
        pipe = cls.from_single_file(str(path), config=str(folder), local_files_only=True, dtype=dtype, **given)
    except Exception as error:  # diffusers, transformers and safetensors each raise their own kinds
        raise InputError(f"{path}: is no {name} by the configs of {folder} ({in_short(error)})") from None
    for part, network in pipe.components.items():
        if isinstance(network, nn.Module):
            if lacking := [key for key, weight in network.state_dict().items() if weight.is_meta]:
                raise InputError(f"{path}: lacks the weight {lacking[0]} of the {part} that {folder} describes")
            if part not in given and (over := without_place(network, held)):
                raise InputError(f"{path}: holds the weight {over[0]}, for which the config of the {part} has no place")
            network.eval().requires_grad_(False)
    return pipe


def without_place(network: nn.Module, held: Mapping[str, torch.Tensor]) -> list[str]:
    """Weights of a file that would be a network's, and for which it has no place, by their names in diffusers, sorted.

    Seen by the function by which diffusers converts names: it takes what is the network's by its prefix, and so leaves
    averages, losses, schedules and the like alone; what it then has too much, diffusers drops without a word. Of text
    encoders nothing is said: files hold more of CLIP than is used (its last layer, projections, ``position_ids``).

    Args:
        held: the tensors of the file; their numbers are not looked at.
    """
    known: Any = SINGLE_FILE_LOADABLE_CLASSES.get(type(network).__name__)
    places = set(network.state_dict())
    if known is None or held.keys() == places:
        return []
    config: Any = network.config
    return sorted(known["checkpoint_mapping_fn"](checkpoint=dict(held), config=dict(config)).keys() - places)


def _is_held(cls: type, names: Collection[str]) -> bool:
    """Whether a part is read from a file that holds tensors of such names; diffusers goes by the same marks."""
    if issubclass(cls, PreTrainedModel):
        return is_clip_model_in_single_file(cls, names) or (cls is T5EncoderModel and is_t5_in_single_file(names))
    if issubclass(cls, AutoencoderKL):  # a file that is a denoiser alone has no prefixes
        return any(name.startswith(tuple(LDM_VAE_KEYS)) for name in names)
    return issubclass(cls, nn.Module)


def _check_part(folder: Path, part: str, named: list) -> None:
    """See that a part of the configs names no code, and brings no pickle where the file lacks it."""
    if issubclass(class_of(folder, part, named), nn.Module):
        read_config(folder / part / "config.json")
    if pickles := [path for path in (folder / part).glob("*") if path.suffix in PICKLES]:
        raise InputError(f"{pickles[0]}: may be a pickle, which can run code; name configs without it")
