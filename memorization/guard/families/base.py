"""What the guard asks of a family of pipelines: how its denoiser is called, and what the output means.

A family is one file and derives from :class:`Family`. It knows the pipeline's ``__call__`` only as far as the
denoiser's arguments go; the pipeline itself is the user's and runs as it is.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from memorization.errors import InputError
from memorization.registry import Registry

Arguments = Mapping[str, Any]  # of a denoiser call, by name


class Scale(NamedTuple):
    """What a denoiser's output means where x_t = alpha * x0 + sigma * eps.

    Attributes:
        kind: what it predicts; ``flow`` is the velocity eps - x0, with alpha = 1 - sigma.
    """

    kind: Literal["epsilon", "v_prediction", "sample", "flow"]
    alpha: float
    sigma: float

    def x0(self, output: Tensor, x: Tensor) -> Tensor:
        """The clean latents that an output implies."""
        if self.kind == "epsilon":
            return (x - self.sigma * output) / self.alpha
        if self.kind == "v_prediction":
            return self.alpha * x - self.sigma * output
        return output if self.kind == "sample" else x - self.sigma * output

    def eps(self, output: Tensor, x: Tensor) -> Tensor:
        """The noise that an output implies."""
        if self.kind == "epsilon":
            return output
        if self.kind == "v_prediction":
            return self.alpha * output + self.sigma * x
        return (x - self.alpha * output) / self.sigma if self.kind == "sample" else x + self.alpha * output

    def output(self, eps: Tensor, x: Tensor) -> Tensor:
        """The output that implies a noise: :meth:`eps`, the other way. Of a flow it does not exist where alpha is 0."""
        if self.kind == "epsilon":
            return eps
        if self.kind == "v_prediction":
            return (eps - self.sigma * x) / self.alpha
        return (x - self.sigma * eps) / self.alpha if self.kind == "sample" else (eps - x) / self.alpha

    def pull(self, uncond: Tensor, cond: Tensor) -> Tensor:
        """D = || x0_c - x0_u || / sqrt(d), ``(rows,)``, of outputs ``(rows, ...)``: the root mean square difference.

        At a fixed timestep of a model that is no flow it is the norm of Wen et al. (noise_norm) times a constant. It is
        taken in x0 since differences of eps are 0 at the first step of a flow, whatever the model does.
        """
        difference = (cond - uncond).float()
        clean = self.x0(difference, torch.zeros_like(difference))  # conversions are linear: x cancels
        return clean.flatten(1).norm(dim=1) / math.sqrt(clean[0].numel())

    def norm_of(self, pull: float, numbers: int) -> float:
        """The norm || eps_c - eps_u || of a latent of so many ``numbers`` that belongs to a pull."""
        return pull * math.sqrt(numbers) * self.alpha / self.sigma


class Family(ABC):
    """Pipelines that call their denoiser alike.

    Attributes:
        pipelines: names of diffusers' classes; those that derive from them count too.
        part: where the pipeline has its denoiser.
        arguments: names of the denoiser's arguments, in their order, as far as a pipeline gives them by place.
        latents: the name of the latents among them.
        mitigable: whether the tool's mitigations know its models.
    """

    name: ClassVar[str]
    pipelines: ClassVar[tuple[str, ...]]
    part: ClassVar[str]
    arguments: ClassVar[tuple[str, ...]]
    latents: ClassVar[str]
    mitigable: ClassVar[bool] = False

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
    "family", "memorization.guard.families", ("stable_diffusion", "sdxl", "sd3"), "memorization.guard_families"
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
    raise InputError(f"{type(pipe).__name__}: no pipeline that can be protected; there are: {known}")
