"""A transformer in GGUF, as quantized models are exchanged: read by diffusers, with the other parts of a folder.

Weights of linear layers stay as small as they are in the file; each layer makes numbers of them when it is called, in
float16 and from there in the dtype that is asked for. A GGUF holds numbers and notes, no code, and its notes are not
obeyed.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import DiffusionPipeline, GGUFQuantizationConfig
from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES
from diffusers.models.model_loading_utils import load_gguf_checkpoint
from huggingface_hub import snapshot_download
from torch import nn

from memorization.errors import InputError
from memorization.io.files import reading
from memorization.models.checkpoint import check_class, find_folder, in_short
from memorization.models.devices import DTYPES
from memorization.models.index import read_index
from memorization.models.pipelines import UNUSED, class_of, is_other, load_other

PART = "transformer"


def parts_for(path: Path, config: str | None) -> Path:
    """The folder of a GGUF's config and of the other parts; of a hub id all but the transformer's weights is fetched.

    Raises:
        InputError: none is named, or it is not there; or ``path`` is no whole GGUF, or the package is missing.
    """
    _check_file(path)
    if config is None:
        said = "is a transformer alone; a folder in diffusers format, or a hub id, has its config and the other parts"
        raise InputError(f"{path}: {said}: --config FOLDER")

    without: dict[str, Any] = dict.fromkeys((*UNUSED, PART))

    def fetch(identifier: str) -> str:
        DiffusionPipeline.download(identifier, use_safetensors=True, **without)
        return snapshot_download(identifier, allow_patterns=[f"{PART}/config.json"])

    return find_folder([config], fetch)


def load_gguf(path: Path, folder: Path, dtype: str, *, pictures: bool = True) -> Any:
    """A pipeline of diffusers whose transformer is a GGUF; all else comes from the folder.

    Args:
        dtype: of the other parts, and of what the transformer computes.
        pictures: load the autoencoder too; scores of prompts do without it.

    Raises:
        InputError: the pipeline has no transformer that diffusers reads so, file and config do not belong together, or
            a part of the folder is missing or damaged.
    """
    index = read_index(folder)
    name = index["_class_name"]
    cls: Any = class_of(folder, PART, index[PART]) if is_other(name) and PART in index else None
    if cls is None or cls.__name__ not in SINGLE_FILE_LOADABLE_CLASSES:
        raise InputError(f"{path}: of a {name} no GGUF is read; give its folder in diffusers format")
    network = _load_transformer(path, cls, folder / PART, DTYPES[dtype])
    return load_other(folder, dtype, pictures=pictures, **{PART: network})


def _check_file(path: Path) -> None:
    """See that a file is a whole GGUF, and of numbers that diffusers reads; only its header is read."""
    if importlib.util.find_spec("gguf") is None:
        raise InputError(f"{path}: needs the package gguf: pip install gguf")
    from diffusers.quantizers.gguf.utils import SUPPORTED_GGUF_QUANT_TYPES
    from gguf import GGMLQuantizationType, GGUFReader

    with reading(path) as file:
        file.read(1)  # says what is wrong with the file itself
    try:
        tensors = GGUFReader(path).tensors
    except Exception as error:  # whatever it finds first that does not fit
        raise InputError(f"{path}: no whole file in GGUF ({in_short(error)})") from None
    known = (GGMLQuantizationType.F32, GGMLQuantizationType.F16, *SUPPORTED_GGUF_QUANT_TYPES)
    for name, kind in ((tensor.name, tensor.tensor_type) for tensor in tensors):
        if kind not in known:
            raise InputError(f"{path}: its {name} is in {kind.name}, which diffusers does not read")


def _load_transformer(path: Path, cls: Any, folder: Path, dtype: torch.dtype) -> Any:
    """A network of a GGUF with all its weights and no others, frozen."""
    from diffusers.quantizers.gguf.utils import dequantize_gguf_tensor  # needs the package

    check_class(cls, folder / "config.json", True)
    try:
        with init_empty_weights():
            blank = cls.from_config(cls.load_config(folder, local_files_only=True))
    except Exception as error:  # whatever a value of the config does to the network
        raise InputError(f"{folder / 'config.json'}: no {cls.__name__} can be made of it ({in_short(error)})") from None
    weights = _named(path, cls, blank)
    linear = {f"{name}.weight" for name, module in blank.named_modules() if isinstance(module, nn.Linear)}
    # Elsewhere than in linear layers diffusers would take quantized numbers for bytes.
    weights = {name: one if name in linear else dequantize_gguf_tensor(one) for name, one in weights.items()}
    try:
        network = cls.from_single_file(
            weights, config=str(folder), local_files_only=True, dtype=dtype,
            quantization_config=GGUFQuantizationConfig(compute_dtype=dtype),
        )  # fmt: skip
    except Exception as error:  # diffusers and torch each raise their own kinds
        raise InputError(f"{path}: is no {cls.__name__} by the config of {folder} ({in_short(error)})") from None
    return network.eval().requires_grad_(False)


def _named(path: Path, cls: Any, blank: Any) -> dict[str, torch.Tensor]:
    """The weights of a file under the names of diffusers: as it has them, or the original ones, which are converted."""
    weights = load_gguf_checkpoint(str(path))
    places, first = set(blank.state_dict()), next(iter(weights), "none")
    if not (weights.keys() <= places or weights.keys() >= places):
        try:
            known: dict[str, Any] = SINGLE_FILE_LOADABLE_CLASSES[cls.__name__]
            weights = known["checkpoint_mapping_fn"](checkpoint=weights, config=dict(blank.config))
        except Exception as error:  # whatever it finds first that is not there
            said = f"its weights ({first}, ...) are no {cls.__name__}'s by name"
            raise InputError(f"{path}: {said} ({in_short(error)})") from None
    if lacking := places - weights.keys():
        raise InputError(f"{path}: lacks the weight {min(lacking)}")
    if over := weights.keys() - places:  # diffusers would leave them out without a word
        raise InputError(f"{path}: holds the weight {min(over)}, for which the config has no place")
    return weights
