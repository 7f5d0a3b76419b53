"""LoRA adapters: examined, put onto a pipeline and taken off again, and changed without data.

The formats of peft, of diffusers' training scripts and of kohya's trainers, as diffusers reads them; safetensors alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import StableDiffusionPipeline
from diffusers.utils import logging
from safetensors import safe_open
from torch import Tensor

from local_sd_pipeline import LocalStableDiffusionPipeline
from memorization.errors import InputError
from memorization.io.files import reading, replacing
from memorization.models.checkpoint import in_short

DOWN = re.compile(r"(.+?)[._](?:lora\.down|lora_down|lora_A|lora_linear_layer\.down)\.weight")
TEXT = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj", "to_out.0": "out_proj"}
NAME = "audited"  # of the adapter, in the pipeline


class Layer(NamedTuple):
    """What an adapter adds to one weight: ``up @ down``, of ``(out, rank)`` and ``(rank, in)``, its scale folded in."""

    down: Tensor
    up: Tensor


def header_of(path: Path) -> tuple[list[str], dict[str, str]]:
    """Names of the tensors of an adapter's file, and what its trainer noted; only the header is read.

    Raises:
        InputError: it is no whole file in safetensors, or holds no plain LoRA.
    """
    names, noted = _header(path)
    if not any(map(DOWN.fullmatch, names)):
        raise InputError(f"{path}: holds no LoRA; give an adapter, or the folder of a fine-tuned checkpoint")
    if any("dora_scale" in name or "lora_magnitude_vector" in name for name in names):
        raise InputError(f"{path}: a DoRA; only plain LoRAs can be read")  # diffusers would drop its magnitudes
    return names, noted


def holds_lora(path: Path) -> bool:
    """Whether any tensor of a file is a LoRA's; of an optimizer's state, an embedding or a VAE none is.

    Raises:
        InputError: it is no whole file in safetensors.
    """
    return any(map(DOWN.fullmatch, _header(path)[0]))


def _header(path: Path) -> tuple[list[str], dict[str, str]]:
    if path.suffix != ".safetensors":
        raise InputError(f"{path}: only safetensors are loaded")
    with reading(path) as file:
        file.read(1)  # says what is wrong with the file itself
    try:
        with safe_open(path, "pt") as file:  # reads the header, which says how long the file is
            return list(file.keys()), file.metadata() or {}
    except Exception as error:  # safetensors raises its own kinds
        raise InputError(f"{path}: no whole file in safetensors ({in_short(error)})") from None


@contextmanager
def wearing(pipe: LocalStableDiffusionPipeline, path: Path) -> Iterator[None]:
    """The pipeline with an adapter, for as long as the block lasts; afterwards its weights are what they were, to the
    bit.

    Raises:
        InputError: it is no adapter, or one of another architecture.
    """
    try:
        _load(pipe, path, NAME)
        yield
    finally:
        pipe.unload_lora_weights()


def put_on(pipe: Any, adapters: Sequence[tuple[Path, float]]) -> None:
    """Give a pipeline of diffusers some adapters for good, each at a scale; they add up.

    Raises:
        InputError: the pipeline takes none, or one is no adapter, or one of another architecture.
    """
    if adapters and not hasattr(pipe, "load_lora_weights"):
        raise InputError(f"{type(pipe).__name__}: takes no LoRA")
    names = [f"{NAME}{i}" for i in range(len(adapters))]
    for name, (path, _) in zip(names, adapters, strict=True):
        _load(pipe, path, name)
    if adapters:
        pipe.set_adapters(names, [scale for _, scale in adapters])
        for network in _networks(pipe):
            network.requires_grad_(False)


def _load(pipe: Any, path: Path, name: str) -> None:
    """Put an adapter on under a name, and see that all of it found a place."""
    header_of(path)
    try:
        with _quiet():
            layers = pipe.lora_state_dict(str(path), local_files_only=True, use_safetensors=True)
            pipe.load_lora_weights(str(path), adapter_name=name, local_files_only=True, use_safetensors=True)
    except Exception as error:  # diffusers, peft and torch each raise their own kinds
        said = in_short(error).partition(" size mismatch")[0]
        raise InputError(f"{path}: is no adapter of this base; it was made for another one? ({said})") from None
    _check_layers(pipe, layers[0] if isinstance(layers, tuple) else layers, path, name)
    for network in _networks(pipe):
        network.eval()  # its layers come as for training, with the dropout that the file notes


@contextmanager
def without_adapter(pipe: LocalStableDiffusionPipeline) -> Iterator[None]:
    """Within :func:`wearing`: the base alone."""
    pipe.disable_lora()
    try:
        yield
    finally:
        pipe.enable_lora()


def _networks(pipe: Any) -> list[torch.nn.Module]:
    return [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]


def _check_layers(pipe: Any, layers: dict[str, Tensor], path: Path, name: str) -> None:
    """See that every layer of the file found its place and that all are finite."""
    placed = [
        module for network in _networks(pipe) for module in network.modules() if name in getattr(module, "lora_A", ())
    ]  # fmt: skip
    wanted = sum(bool(DOWN.fullmatch(key)) for key in layers)
    if len(placed) != wanted:
        raise InputError(f"{path}: {wanted - len(placed)} of its {wanted} layers have no place in this base")
    if broken := [key for key, tensor in layers.items() if not tensor.isfinite().all()]:
        raise InputError(f"{path}: {broken[0]} holds NaN or infinity")


@contextmanager
def _quiet() -> Iterator[None]:
    """diffusers logs every layer that does not fit; one line of ours says it."""
    before = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(before)


def read_layers(path: Path) -> dict[str, Layer]:
    """The layers of an adapter by the names of diffusers (``unet.``..., ``text_encoder.``...), float32.

    Raises:
        InputError: it is no LoRA, or has ranks of its own for some layers that it notes elsewhere.
    """
    header_of(path)
    try:
        with _quiet():
            tensors, alphas, noted = StableDiffusionPipeline.lora_state_dict(
                str(path), local_files_only=True, use_safetensors=True, return_lora_metadata=True
            )
    except Exception as error:
        raise InputError(f"{path}: cannot be read as a LoRA of Stable Diffusion ({in_short(error)})") from None
    unusual = ("alpha_pattern", "rank_pattern", "use_rslora")
    if any(value for key, value in (noted or {}).items() if key.endswith(unusual)):
        raise InputError(f"{path}: its layers have ranks or scales of their own; it can be audited, but not changed")
    scales = {name.removesuffix(".alpha"): alpha for name, alpha in (alphas or {}).items()}
    found = {}
    for name, down in tensors.items():
        if not (match := DOWN.fullmatch(name)):
            continue
        up = next(tensors[other] for other in _ups(name) if other in tensors)
        part, rank = name.partition(".")[0], down.shape[0]
        own = [scales[key] for key in (name, match[1]) if key in scales]
        alpha = own[0] if own else (noted or {}).get(f"{part}.lora_alpha")
        found[_module(match[1])] = Layer(down.float(), up.float() * (1 if alpha is None else float(alpha) / rank))
    return found


def _ups(down: str) -> tuple[str, str]:
    """How the other half of a layer may be called."""
    start, _, end = down.rpartition("down")
    return f"{start}up{end}", down.replace("lora_A", "lora_B")


def _module(stem: str) -> str:
    """The module of a layer: older formats name the processor of an attention, and layers otherwise."""
    name = stem.replace(".processor.", ".")
    if name.startswith("text_encoder."):
        start, _, last = name.replace(".text_model.", ".").rpartition(".self_attn.")
        return f"{start}.self_attn.{TEXT.get(last, last)}" if start else last
    return f"{name}.0" if name.endswith(".to_out") else name


def save_layers(layers: dict[str, Layer], path: Path) -> None:
    """Write an adapter in peft's names, which diffusers loads; whole or not at all."""
    from safetensors.torch import save_file

    tensors = {f"{stem}.lora_A.weight": layer.down.contiguous() for stem, layer in layers.items()}
    tensors |= {f"{stem}.lora_B.weight": layer.up.contiguous() for stem, layer in layers.items()}
    with replacing(path) as part:
        save_file(tensors, part, metadata={"format": "pt"})


def scaled(layers: dict[str, Layer], scale: float) -> dict[str, Layer]:
    """The adapter at another strength: what it adds to each weight, times ``scale``."""
    return {stem: Layer(layer.down, layer.up * scale) for stem, layer in layers.items()}


def aligned(
    layers: dict[str, Layer], pipe: LocalStableDiffusionPipeline, keep: float, energy: float = 0.9
) -> dict[str, Layer]:
    """The adapter without the singular directions that are least aligned with the base's own; needs no data.

    dW = U S V' of a layer; U0, V0 the leading singular vectors of the base's weight, as many as hold ``energy`` of its
    squares. Direction i stays if |U0' u_i| |V0' v_i| is among the ``keep`` largest of the layer, one at least.

    Source: arXiv 2605.10439, which drops channels of dW that are weakly aligned with the base's principal subspace.
    Deviation: singular directions instead of channels, and a share that is kept instead of a limit. Weights of
    convolutions are taken as matrices ``(out, in * kernel)``.

    Raises:
        InputError: the base has no such weight.
    """
    return {stem: _aligned(layer, base_weight(pipe, stem), keep, energy) for stem, layer in layers.items()}


def base_weight(pipe: LocalStableDiffusionPipeline, stem: str) -> Tensor:
    """The weight that a layer is added to, ``(out, in)``, float32."""
    part, _, name = stem.partition(".")
    try:
        module = getattr(pipe, part).get_submodule(name)
        return module.weight.detach().float().flatten(1)
    except AttributeError:
        raise InputError(f"the base has no layer {stem}: the adapter was made for another one") from None


def _aligned(layer: Layer, weight: Tensor, keep: float, energy: float) -> Layer:
    up, down = layer.up.flatten(1), layer.down.flatten(1)
    if (len(up), down.shape[1]) != tuple(weight.shape):
        raise InputError(f"a layer adds {len(up)} x {down.shape[1]} to a weight of {tuple(weight.shape)}")
    left, size, right = torch.linalg.svd(up @ down, full_matrices=False)
    own_left, own_size, own_right = torch.linalg.svd(weight, full_matrices=False)
    held = own_size.square().cumsum(0) / own_size.square().sum()
    leading = int((held < energy).sum()) + 1
    rank = len(down)
    alignment = (own_left[:, :leading].T @ left[:, :rank]).norm(dim=0) * (own_right[:leading] @ right[:rank].T).norm(
        dim=0
    )
    chosen = alignment.argsort(descending=True)[: max(1, round(keep * rank))].sort().values
    root = size[chosen].sqrt()
    new_up, new_down = left[:, chosen] * root, root[:, None] * right[chosen]
    return Layer(
        new_down.reshape(-1, *layer.down.shape[1:]), new_up.reshape(-1, len(chosen), *layer.up.shape[2:])
    )  # fmt: skip
