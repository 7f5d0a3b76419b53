"""A pipeline that has no file here: what its call gives the denoiser is read, and must be what its own sampler acts on.

Which tensors hold the prompt is seen from two prompts, how time is given from the scheduler, what the output means from
the scheduler's kind. All of it is checked on a first step (``check_step`` of memorization/models/replay.py): a pipeline
whose output means something else is refused.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from local_sd_pipeline import Scale
from memorization.errors import InputError
from memorization.models.families.base import Arguments, Family, discrete_scale

Path = tuple[str, ...]  # to a tensor among the arguments, which may lie in tables


class Guessed(Family):
    """A family of one pipeline; :meth:`read` is to be called before it is asked anything.

    Raises:
        InputError: the pipeline is not of the kind that can be read; says what is missing.
    """

    name: ClassVar[str] = "guessed"
    pipelines: ClassVar[tuple[str, ...]] = ()
    watchable: ClassVar[bool] = False

    def __init__(self, pipe: Any) -> None:
        super().__init__()
        found = [part for part in ("transformer", "unet") if getattr(pipe, part, None) is not None]
        if not found:
            raise InputError(f"{type(pipe).__name__}: has no transformer and no unet")
        self.part = found[0]  # ty: ignore[invalid-attribute-access]
        denoiser = getattr(pipe, self.part)
        self.arguments = tuple(inspect.signature(denoiser.forward).parameters)  # ty: ignore[invalid-attribute-access]
        self.latents = self.arguments[0]  # ty: ignore[invalid-attribute-access]
        takes_scale = "guidance_scale" in inspect.signature(type(pipe).__call__).parameters
        embedded = getattr(denoiser.config, "guidance_embeds", False)
        self.unguided = {"guidance_scale": 1.0} if takes_scale and not embedded else {}  # ty: ignore[invalid-attribute-access]
        self.paths: list[Path] = []

    def read(self, pipe: Any, call: Arguments) -> None:
        """Find out, from a call for two different prompts, which tensors hold them.

        Raises:
            InputError: they cannot be told, or the scheduler's kind is not known.
        """
        name, latents = type(pipe).__name__, call.get(self.latents)
        if not isinstance(latents, Tensor) or latents.dim() not in (3, 4):
            raise InputError(f"{name}: gives its denoiser no latents of two or three axes a row")
        if not isinstance(call.get("timestep"), Tensor):
            raise InputError(f"{name}: gives its denoiser no timestep")
        if not (self.flows(pipe) or isinstance(getattr(pipe.scheduler, "alphas_cumprod", None), Tensor)):
            raise InputError(f"{name}: {type(pipe.scheduler).__name__} says not how much noise there is at a timestep")
        self.packed = latents.dim() == 3
        self.paths = [path for path, one in _tensors(call) if path[0] not in (self.latents, "timestep")
                      and len(one) == 2 and not bool((one[0] == one[1]).all())]  # fmt: skip
        if not self.paths:
            raise InputError(f"{name}: gives its denoiser nothing that tells prompts apart")
        self.embeddings = tuple("/".join(path) for path in self.paths)  # ty: ignore[invalid-attribute-access]

    def guidance_scale(self, pipe: Any) -> float:
        """1 where the denoiser is given the pipeline's own."""
        embedded = getattr(getattr(pipe, self.part).config, "guidance_embeds", False)
        return 1.0 if embedded else super().guidance_scale(pipe)

    @staticmethod
    def flows(pipe: Any) -> bool:
        """Whether the scheduler is a flow's."""
        return isinstance(pipe.scheduler, FlowMatchEulerDiscreteScheduler)

    def scale(self, pipe: Any, timestep: float) -> Scale:
        if not self.flows(pipe):
            return discrete_scale(pipe.scheduler, timestep)
        sigma = timestep / pipe.scheduler.config.num_train_timesteps
        return Scale("flow", 1 - sigma, sigma)

    def condition(self, named: Arguments) -> list[Tensor]:
        found = dict(_tensors(named))
        return [found[path] for path in self.paths]

    def conditioned(self, named: Arguments, condition: list[Tensor]) -> dict[str, Any]:
        changed = dict(named)
        for path, one in zip(self.paths, condition, strict=True):
            changed = _replaced(changed, path, one)
        return changed

    def encode_empty(self, pipe: Any) -> list[Tensor] | None:  # ty: ignore[incompatible-method-override]
        """None: as every prompt, by the pipeline's own call."""
        return None

    def prediction(self, output: Tensor, latents: Tensor) -> Tensor:
        """Without what is more than the latents' channels, as a variance."""
        return output[:, : latents.shape[1]]

    def pack(self, latents: Tensor) -> Tensor:
        return latents[..., 0].transpose(1, 2) if self.packed else latents

    def unpack(self, pipe: Any, packed: Tensor, call: Arguments) -> Tensor:
        """Packed latents ``(rows, places, channels)`` as a column of places, ``(rows, channels, places, 1)``."""
        return packed.transpose(1, 2)[..., None] if self.packed else packed


def _tensors(value: Mapping[str, Any], path: Path = ()) -> Iterator[tuple[Path, Tensor]]:
    """Every tensor with rows, in tables too."""
    for key, one in value.items():
        if isinstance(one, Tensor) and one.dim():
            yield (*path, key), one
        elif isinstance(one, Mapping):
            yield from _tensors(one, (*path, key))


def _replaced(value: Mapping[str, Any], path: Path, new: Tensor) -> dict[str, Any]:
    key, *rest = path
    return {**value, key: _replaced(value[key], tuple(rest), new) if rest else new}
