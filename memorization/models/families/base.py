"""A family of pipelines: how its denoiser is called, and what the output means.

A family is one file and derives from :class:`Family`. It knows the pipeline's ``__call__`` only as far as the
denoiser's arguments go: the guard watches a user's pipeline run, and :class:`memorization.models.replay.Replay` makes
the calls that it made again, with latents, times and prompts of its own.
"""

from __future__ import annotations

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from local_sd_pipeline import Scale
from memorization.errors import InputError
from memorization.registry import Registry

Arguments = Mapping[str, Any]  # of a denoiser call, by name


class Family(ABC):
    """Pipelines that call their denoiser alike.

    Attributes:
        pipelines: names of diffusers' classes; those that derive from them count too.
        part: where the pipeline has its denoiser.
        arguments: names of the denoiser's arguments, in their order, as far as a pipeline gives them by place.
        latents: the name of the latents among them.
        embeddings: names, in the pipeline's ``__call__``, of the tensors that hold the prompt.
        unguided: arguments of ``__call__`` under which its denoiser is given conditional rows alone.
        mitigable: whether the guard can apply the tool's mitigations to it.
        watchable: whether the guard knows how its pipelines are watched.
    """

    name: ClassVar[str]
    pipelines: ClassVar[tuple[str, ...]]
    part: ClassVar[str]
    arguments: ClassVar[tuple[str, ...]]
    latents: ClassVar[str]
    embeddings: ClassVar[tuple[str, ...]] = ("prompt_embeds",)
    unguided: ClassVar[Mapping[str, Any]] = {"guidance_scale": 1.0}
    mitigable: ClassVar[bool] = False
    watchable: ClassVar[bool] = True

    packed: bool = False  # whether latents as they are unpacked are still no picture's

    def __init__(self) -> None:
        self._empty: list[Tensor] | None = None  # what stands for no prompt, of one row

    def denoiser(self, pipe: Any) -> nn.Module:
        """What predicts."""
        return getattr(pipe, self.part)

    def named(self, args: tuple, kwargs: Arguments) -> dict[str, Any]:
        """The arguments of a call by name, so that it can be made again."""
        return {**dict(zip(self.arguments, args, strict=False)), **kwargs}

    def is_guided(self, pipe: Any) -> bool:
        """Whether a call holds unconditional rows and then, as many, conditional ones."""
        return pipe.do_classifier_free_guidance

    @abstractmethod
    def scale(self, pipe: Any, timestep: float) -> Scale:
        """What the output means at a timestep of the scheduler."""

    @abstractmethod
    def condition(self, named: Arguments) -> list[Tensor]:
        """The tensors of a call that hold the prompt, a row each."""

    @abstractmethod
    def conditioned(self, named: Arguments, condition: list[Tensor]) -> dict[str, Any]:
        """A call under another condition."""

    @abstractmethod
    def encode_empty(self, pipe: Any) -> list[Tensor]:
        """The condition of no prompt, one row: what the pipeline's guidance takes where nothing negative is given."""

    def contrast(self, pipe: Any) -> str:
        """What stands for no prompt, in words; a run's settings keep it."""
        return "the empty prompt"

    def read(self, pipe: Any, call: Arguments) -> None:  # noqa: B027 - most know it all from the start
        """Learn from a call for two different prompts."""

    def prediction(self, output: Tensor, latents: Tensor) -> Tensor:
        """The prediction in an output, ``(rows, ...)`` as ``latents``: some denoisers give more."""
        return output

    def pack(self, latents: Tensor) -> Tensor:
        """Latents ``(rows, c, h, w)`` as the denoiser is given them."""
        return latents

    def unpack(self, pipe: Any, packed: Tensor, call: Arguments) -> Tensor:
        """:meth:`pack`, the other way; ``call`` is one that the pipeline made."""
        return packed

    def guidance_scale(self, pipe: Any) -> float:
        """Of generations: the default of the pipeline's ``__call__``; 1, no guidance, where it has none."""
        scale = inspect.signature(type(pipe).__call__).parameters.get("guidance_scale")
        return float(scale.default) if scale and isinstance(scale.default, (int, float)) else 1.0

    def empty(self, pipe: Any, unconditional: list[Tensor] | None) -> list[Tensor]:
        """The condition of no prompt, ``(1, ...)`` each.

        It is encoded once, and again where the call's ``unconditional`` rows are another: either text encoders were
        changed since, as by a LoRA, or the user gave a negative prompt.
        """
        if self._empty is None or (unconditional is not None and not self.same(unconditional, self._empty)):
            self._empty = self.encode_empty(pipe)
        return self._empty

    @staticmethod
    def same(left: list[Tensor], right: list[Tensor]) -> bool:
        """Whether conditions agree but for what the batch size does to the last bits."""
        return all(
            a.shape[1:] == b.shape[1:] and torch.allclose(a.float(), b.to(a).float(), rtol=1e-2, atol=1e-2)
            for a, b in zip(left, right, strict=True)
        )


class PooledFlow(Family):
    """A transformer that predicts the velocity of a rectified flow from token states and pooled ones."""

    part: ClassVar[str] = "transformer"
    latents: ClassVar[str] = "hidden_states"
    embeddings: ClassVar[tuple[str, ...]] = ("prompt_embeds", "pooled_prompt_embeds")

    def scale(self, pipe: Any, timestep: float) -> Scale:
        sigma = timestep / pipe.scheduler.config.num_train_timesteps
        return Scale("flow", 1 - sigma, sigma)

    def condition(self, named: Arguments) -> list[Tensor]:
        return [named["encoder_hidden_states"], named["pooled_projections"]]

    def conditioned(self, named: Arguments, condition: list[Tensor]) -> dict[str, Any]:
        return {**named, "encoder_hidden_states": condition[0], "pooled_projections": condition[1]}


def discrete_scale(scheduler: Any, timestep: float) -> Scale:
    """Of a variance-preserving model; between two timesteps sigma / alpha is interpolated by its logarithm.

    Raises:
        InputError: at this timestep nothing of x0 is left, which a model of eps cannot give back.
    """
    table, kind = scheduler.alphas_cumprod, scheduler.config.prediction_type
    low = min(int(timestep), len(table) - 1)
    high = min(low + 1, len(table) - 1)
    alpha_bar = table[low].item()
    if timestep != low and high != low:
        odds = [math.log((1 - table[t].item()) / table[t].item()) for t in (low, high)]
        alpha_bar = 1 / (1 + math.exp(odds[0] + (timestep - low) * (odds[1] - odds[0])))
    if kind == "epsilon" and alpha_bar == 0:
        raise InputError("a model of eps with zero terminal signal: its first step says nothing of the picture")
    return Scale(kind, math.sqrt(alpha_bar), math.sqrt(1 - alpha_bar))


FAMILIES: Registry[Family] = Registry(
    "family",
    "memorization.models.families",
    ("stable_diffusion", "sdxl", "sd3", "pixart", "flux"),
    "memorization.families",
)


def family_of(pipe: Any) -> Family:
    """The family of a pipeline.

    Raises:
        InputError: it is of none that is known.
    """
    classes = {cls.__name__ for cls in type(pipe).__mro__}
    for family in FAMILIES.values():
        if classes & set(family.pipelines):
            return family()
    known = ", ".join(name for family in FAMILIES.values() for name in family.pipelines)
    raise InputError(f"{type(pipe).__name__}: no pipeline that is known; there are: {known}")


def take(value: Any, places: Sequence[int], of: int) -> Any:
    """The rows at ``places`` of every tensor that has ``of`` rows, in tables and lists too; all else as it is."""
    if isinstance(value, dict):
        return {key: take(one, places, of) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [take(one, places, of) for one in value]
    return value[places] if isinstance(value, Tensor) and value.dim() and len(value) == of else value
