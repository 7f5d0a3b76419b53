"""A checkpoint's folder: examined before anything of it is opened, loaded part by part, and told from every other.

What is loaded is data: weights in safetensors and configs in JSON. A config may name classes, files and kernels, with
which the libraries would run code, unpickle, or fetch; whatever does is refused here, before they see it.
"""

from __future__ import annotations

import hashlib
import inspect
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from transformers import CLIPModel, CLIPTextModel, CLIPTokenizer

from memorization.errors import InputError
from memorization.io.files import read_json, sha256_of
from memorization.models.consistency import is_count
from memorization.paths import ROOT

CODE = ("auto_map", "custom_pipeline", "custom_pipelines")
ELSEWHERE = ("transformers_weights", "quantization_config")  # further files and packages
ATTENTION = ("_attn_implementation", "attn_implementation", "_attn_implementation_internal")
KNOWN_ATTENTION = (None, "eager", "sdpa")  # those of torch itself; every other name may be a kernel of the hub
# Keys of old checkpoints that are computed today, and what else lies in a whole CLIP of which the text half is asked.
HARMLESS = {
    CLIPTextModel: ("position_ids", "vision_model.", "visual_projection.", "text_projection.", "logit_scale"),
    CLIPModel: ("position_ids",),
}
SHAPING = (".json", ".txt", ".model", ".safetensors")  # the files of a part that its numbers can come from


def find_folder(identifiers: Iterable[str], fetch: Callable[[str], str | os.PathLike], advice: str = "") -> Path:
    """The first of some folders and hub ids that can be had.

    Args:
        fetch: downloads a hub id, and says where to.
        advice: what to do where there is none.

    Raises:
        InputError: none can be had.
    """
    reasons = []
    for identifier in identifiers:
        if os.path.isdir(identifier):  # noqa: PTH112 - for every name, unlike that of Path
            return Path(identifier)
        if Path(identifier).is_absolute() or identifier.count("/") > 1 or os.path.exists(identifier):  # noqa: PTH110
            shipped = "" if (ROOT / "testbed").is_dir() else "; the shipped models lie in the repository alone"
            reasons.append(f"{identifier}: no such folder{shipped}")
            continue
        try:
            return Path(fetch(identifier))
        except Exception as error:  # diffusers and the hub client raise their own kinds
            reasons.append(f"{identifier}: no folder, and the hub does not give it ({in_short(error)})")
    raise InputError(f"{'; '.join(reasons)}{advice}")


def fetch_part(identifier: str, part: str, stem: str) -> str:
    """Download configs and weights of one part of a hub id (``""``: of its top); says where to."""
    weights = (f"{stem}.safetensors", f"{stem}-*.safetensors")
    return snapshot_download(identifier, allow_patterns=[f"{part}{name}" for name in ("*.json", "*.txt", *weights)])


def read_config(path: Path) -> dict[str, Any]:
    """A config of a checkpoint.

    Raises:
        InputError: it is none, or names code, other files or kernels; names the file.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    try:
        config = read_json(path)
        if not isinstance(config, dict):
            raise InputError(f"{path}: holds no table of settings")
        items = list(_items(config))
    except RecursionError:
        raise InputError(f"{path}: cannot be read (nested too deep)") from None
    for key, value in items:
        if key in CODE:
            raise InputError(f"{path}: {key} names code; no code of a checkpoint is run")
        if key in ELSEWHERE:
            raise InputError(f"{path}: {key} is not supported; only whole weights in safetensors are loaded")
        if key in ATTENTION and not (value is None or value in KNOWN_ATTENTION):
            raise InputError(f"{path}: {key} = {value} is no known one; there are: eager, sdpa")
    return config


def _items(config: dict) -> Iterator[tuple[str, Any]]:
    """Keys and values of a config and of those in it."""
    for key, value in config.items():
        yield key, value
        if isinstance(value, dict):
            yield from _items(value)


def read_named(path: Path, cls: type, written: Collection[str]) -> dict[str, Any]:
    """A config whose keys are those of a class, as far as can be told: others have come and gone with versions.

    Args:
        written: the keys that the class knows.

    Raises:
        InputError: as :func:`read_config`, or a key that is missing is there with a typo: its default would be taken.
    """
    config = read_config(path)
    for key in config.keys() - set(written):
        if meant := get_close_matches(key, set(written) - config.keys(), 1, 0.85):
            raise InputError(f"{path}: {cls.__name__} has no setting {key!r}; {meant[0]} is meant?")
    return config


def parameters_of(cls: type) -> set[str]:
    """Names of the arguments that a class of diffusers is made with, which are its config's keys."""
    return set(inspect.signature(cls.__init__).parameters)


def load_network(cls: Any, folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """A network with all its weights and no others, frozen: gradients reach what goes in, never weights.

    Args:
        cls: its class in diffusers or transformers.
        folder: of its config and weights.

    Raises:
        InputError: a file is missing or damaged, or weights and config do not belong together; names the part.
    """
    diffusers = hasattr(cls, "load_config")
    check_class(cls, folder / "config.json", diffusers)
    _check_weights(folder, "diffusion_pytorch_model" if diffusers else "model")
    try:
        network, found = cls.from_pretrained(
            folder, dtype=dtype, use_safetensors=True, local_files_only=True, output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are told here, as the others
        )  # fmt: skip
    except Exception as error:  # diffusers, transformers and safetensors each raise their own kinds
        raise InputError(f"{folder}: cannot be loaded as {cls.__name__} in safetensors ({in_short(error)})") from None
    unexpected = [key for key in found["unexpected_keys"] if not _is_harmless(cls, key)]
    for keys, problem in (
        (found["missing_keys"], "lacks the weight {}"),
        (unexpected, "holds the weight {}, for which its config has no place"),
        (
            [mismatched[0] for mismatched in found["mismatched_keys"]],
            "the weight {} has another shape than its config says",
        ),
    ):
        if keys:
            more = f" (and {len(keys) - 1} more)" if len(keys) > 1 else ""
            raise InputError(f"{folder}: {problem.format(min(keys))}{more}")
    return network.eval().requires_grad_(False)


def _is_harmless(cls: type, key: str) -> bool:
    return any(key.startswith(known) or key.endswith(f".{known}") for known in HARMLESS.get(cls, ()))


def check_class(cls: Any, path: Path, diffusers: bool) -> None:
    """See that a config is one of ``cls``, a class of ``diffusers`` or else of transformers.

    Raises:
        InputError: it is not there, or of another, or as :func:`read_named`.
    """
    if not path.is_file():
        raise InputError(f"{path.parent}: no config.json in this folder; a {cls.__name__} is wanted")
    if path.with_name("adapter_config.json").exists():
        raise InputError(f"{path.with_name('adapter_config.json')}: adapters are not loaded; merge it into the weights")
    if diffusers:
        said, named = read_named(path, cls, parameters_of(cls)).get("_class_name"), cls.__name__
        fits = said == named
    else:
        said, named = read_named(path, cls, cls.config_class().to_dict()).get("model_type"), cls.config_class.model_type
        fits = said in (named, "clip")  # half of a whole CLIP is loaded by the whole one's config
    if not fits:
        raise InputError(f"{path}: is no {cls.__name__}'s ({said or 'names no class'})")


def _check_weights(folder: Path, stem: str) -> None:
    """See that the weights are whole files in safetensors, inside the folder."""
    single, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
    files = {single.name}
    if index.exists():
        shards = read_config(index).get("weight_map")
        if not isinstance(shards, dict) or not shards:
            raise InputError(f"{index}: names no weights")
        files = set(map(str, shards.values()))
    elif not single.exists():
        raise InputError(f"{folder}: no {single.name}; only safetensors are loaded")
    for name in sorted(files):
        if not name.endswith(".safetensors"):
            raise InputError(f"{index}: names {name}; only safetensors are loaded")
        if Path(name).name != name or "\\" in name:
            raise InputError(f"{index}: names {name}, which is not in its folder")
    for name in sorted(files):
        try:
            with safe_open(folder / name, "pt"):  # reads the header, which says how long the file is
                pass
        except Exception as error:  # safetensors raises its own kinds
            raise InputError(f"{folder / name}: cannot be read as safetensors ({in_short(error)})") from None


def load_tokenizer(folder: Path) -> CLIPTokenizer:
    """A CLIP tokenizer.

    Raises:
        InputError: a file is missing or damaged.
    """
    path = folder / "tokenizer_config.json"
    length = read_config(path).get("model_max_length")
    if not is_count(length):
        raise InputError(f"{path}: model_max_length = {length!r} is no number of tokens")
    try:
        tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
        tokenizer.tokenize("a")  # what its vocabulary lacks shows when it is used
        return tokenizer
    except BaseException as error:  # the tokenizers' panics are no Exception
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            raise
        raise InputError(f"{folder}: cannot be loaded as a CLIP tokenizer ({in_short(error)})") from None


def in_short(error: BaseException) -> str:
    """Kind and text of a library's exception, as part of a line of ours."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def identity_of(folder: Path, parts: Sequence[str]) -> dict[str, str]:
    """What tells a checkpoint from every other: the sha256 of all that its numbers can come from, by part.

    Args:
        parts: folders in it; files that lie in ``folder`` itself have the name ``""``.
    """
    return {part or "files": _digest(folder / part) for part in parts}


def _digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.iterdir() if path.suffix in SHAPING and path.is_file()):
        digest.update(f"{path.name} {sha256_of(path)}\n".encode())
    return f"sha256:{digest.hexdigest()}"
