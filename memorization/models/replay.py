"""A pipeline of any family as a model: the calls of its denoiser that it made, made again with other inputs.

The pipeline's own ``__call__`` is run up to its first call of the denoiser, so that it has encoded, pooled, masked and
packed everything itself. What is kept of that call is given to the denoiser again, with latents, timesteps and prompts
of ours. What differs between pipelines says a file of memorization/models/families/.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch import Tensor

from local_sd_pipeline import Traced
from memorization.errors import InputError
from memorization.models.base import TextToImage, unit_of
from memorization.models.families.base import Family, take

PAIR = ("a", "a red kite over a harbour at dusk")  # two rows, so that what has a row a picture can be told


class _Called(Exception):
    """The denoiser was called."""

    def __init__(self, named: dict[str, Any]) -> None:
        self.named = named


def first_call(pipe: Any, family: Family, prompts: Sequence[str], **options: Any) -> dict[str, Any]:
    """The arguments, by name, that the pipeline's own call gives its denoiser first; the denoiser is not run.

    Raises:
        InputError: the pipeline cannot be called so, or gives other rows than one a prompt.
    """

    def stop(module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        raise _Called(family.named(args, kwargs))

    hook = family.denoiser(pipe).register_forward_pre_hook(stop, with_kwargs=True)
    asked = {"num_inference_steps": 2, "output_type": "latent", **family.unguided, **options}
    try:
        pipe(prompt=list(prompts), generator=torch.Generator().manual_seed(0), **asked)
    except _Called as called:
        if len(called.named[family.latents]) != len(prompts):
            raise InputError(f"{type(pipe).__name__}: gives its denoiser other rows than one a prompt") from None
        return called.named
    finally:
        hook.remove()
    raise InputError(f"{type(pipe).__name__}: its call does not reach {family.part}")


def _divisor(pipe: Any, time: Tensor) -> float:
    """By what the pipeline divides timesteps before its denoiser is given them: nothing, their number, or another.

    Raises:
        InputError: it gives no share of a timestep, as 1 - s.
    """
    first, given = float(pipe.scheduler.timesteps[0]), float(time.flatten()[0])
    if not (math.isfinite(given) and given > 0):
        raise InputError(
            f"{type(pipe).__name__}: gives its denoiser {given:g} at the first timestep, {first:g}: no share of it, as "
            "1 - s is none; it needs a file of its own (docs/families.md)"
        )
    usual = (1.0, float(pipe.scheduler.config.num_train_timesteps))
    near = [one for one in usual if abs(first / given / one - 1) < 0.01]  # bfloat16 rounds by less than half of that
    return near[0] if near else first / given


class Replay(Traced):
    """A pipeline as a model; see memorization/models/base.py for what it answers to.

    Attributes:
        contrast: what stands for no prompt, in words.
        shaping: names of its parts.
        files: name -> sha256 of further files that it is made of.

    Raises:
        InputError: a cache is enabled on the denoiser, it is a latent consistency model's, or the pipeline's call
            cannot be read.
    """

    def __init__(self, pipe: Any, family: Family) -> None:
        self.pipe, self.family, self.denoiser = pipe, family, family.denoiser(pipe)
        if getattr(self.denoiser, "is_cache_enabled", False):
            raise InputError("a cache is enabled on the denoiser: what it returns is then no prediction; disable it")
        if getattr(self.denoiser.config, "time_cond_proj_dim", None):
            said = "is given a guidance scale with the time (time_cond_proj_dim), as latent consistency models are"
            raise InputError(f"{type(pipe).__name__}: its {family.part} {said}; that is not supported")
        self.contrast = family.contrast(pipe)
        self._call = first_call(pipe, family, PAIR)  # whose latents, time and prompts are replaced
        family.read(pipe, self._call)
        self._shapes = [(torch.Size(one.shape[1:]), one.dtype) for one in family.condition(self._call)]
        self._time: Tensor = self._call["timestep"]
        self._divisor = _divisor(pipe, self._time)
        self._shape = family.unpack(pipe, self._call[family.latents], self._call).shape[1:]
        self._grids: dict[int, list] = {}
        self.shaping = [part for part, one in pipe.components.items() if one is not None]
        self.files: dict[str, str] = {}
        self.prediction_type = family.scale(pipe, 1).kind
        self.can = frozenset(self._abilities())

    def _abilities(self) -> list[str]:
        packed = self.family.packed
        return [
            *(["attention"] if isinstance(self.denoiser, UNet2DConditionModel) else []),
            *(["pictures"] if isinstance(getattr(self.pipe, "vae", None), AutoencoderKL) and not packed else []),
            *(["eps"] if self.prediction_type != "flow" else []),
            *(["guidance"] if self._call.get("guidance") is not None else []),
        ]

    # What the pipeline has
    @property
    def unet(self) -> Any:
        return self.denoiser

    @property
    def vae(self) -> Any:
        return self.pipe.vae

    @property
    def tokenizer(self) -> Any:
        return self.pipe.tokenizer

    @property
    def text_encoder(self) -> Any:
        return self.pipe.text_encoder

    @property
    def scheduler(self) -> Any:
        return self.pipe.scheduler

    @property
    def config(self) -> Any:
        return self.pipe.config

    @property
    def vae_scale_factor(self) -> int:
        return self.pipe.vae_scale_factor

    @property
    def guidance_scale(self) -> float:
        """Of generations, as the pipeline has it by default; 1, no guidance, where the denoiser is given a scale."""
        return self.family.guidance_scale(self.pipe)

    @property
    def device(self) -> torch.device:
        return self.pipe._execution_device

    # What it is asked
    def _encode(self, prompts: Sequence[str]) -> Tensor:
        return self._row_of(self.family.condition(first_call(self.pipe, self.family, prompts)))

    def _encode_blank(self) -> Tensor:
        with torch.no_grad():
            empty = self.family.encode_empty(self.pipe)
        return self._encode([""]) if empty is None else self._row_of(empty)

    def _row_of(self, tensors: Sequence[Tensor]) -> Tensor:
        """The tensors that hold prompts as one, a row a prompt: float32 holds every value of each.

        Raises:
            InputError: prompts of a call are filled up to the longest, so that a row depends on the others.
        """
        if any(one.shape[1:] != shape for one, (shape, _) in zip(tensors, self._shapes, strict=True)):
            raise InputError(f"{type(self.pipe).__name__}: its prompts take as many places as the longest of a call")
        return torch.cat([one.to(self.device).float().flatten(1) for one in tensors], 1)

    def parts(self, embeds: Tensor) -> dict[str, Tensor]:
        """The tensors in embeddings, by the names of the pipeline's ``__call__``."""
        sizes = [shape.numel() for shape, _ in self._shapes]
        split = zip(embeds.split(sizes, 1), self._shapes, strict=True)
        tensors = [
            (one if dtype.is_floating_point else one.round()).unflatten(1, shape).to(dtype)
            for one, (shape, dtype) in split
        ]
        return dict(zip(self.family.embeddings, tensors, strict=True))

    def given(self, embeds: Tensor | None, latents: Tensor | None) -> dict[str, Tensor]:
        """As of every model; latents as the pipeline packs them. Of a pipeline without a family's file nobody knows the
        arguments: nothing."""
        if not self.family.pipelines:
            return {}
        return super().given(embeds, None if latents is None else self.family.pack(latents))

    def free(self, embeds: Tensor) -> Tensor:
        """All but masks."""
        return torch.cat([
            torch.full((1, shape.numel()), float(dtype.is_floating_point), device=embeds.device)
            for shape, dtype in self._shapes
        ], 1)  # fmt: skip

    def pure_noise(self, num_images: int, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(num_images, *self._shape, generator=generator).to(self.device)

    def detection_timesteps(self, steps: int = 50) -> list:
        """DDIM's grid, as of Stable Diffusion; of a flow the timesteps of the pipeline's own sampler."""
        if self.prediction_type != "flow":
            grid = DDIMScheduler.from_config(self.scheduler.config, timestep_spacing="leading", steps_offset=1)
            grid.set_timesteps(steps)
            return grid.timesteps.tolist()
        if steps not in self._grids:
            first_call(self.pipe, self.family, PAIR, num_inference_steps=steps)
            self._grids[steps] = self.scheduler.timesteps.tolist()
        return self._grids[steps]

    def noise_scales(self, timestep: float) -> tuple[float, float]:
        scale = self.family.scale(self.pipe, timestep)
        return scale.alpha, scale.sigma

    def predict_noise(
        self, latents: Tensor, timestep: float, prompt_embeds: Tensor, guidance: float | None = None
    ) -> Tensor:
        """eps, or a flow's velocity, ``(b, c, h, w)``, float32.

        Args:
            guidance: the embedded guidance scale, instead of the pipeline's own; for models that can ``guidance``.
        """
        family, call = self.family, self._call
        named = take(call, [0] * len(latents), len(PAIR))
        named = family.conditioned(named, list(self.parts(prompt_embeds).values()))
        named[family.latents] = family.pack(latents).to(call[family.latents].dtype)
        named["timestep"] = self._times(timestep, len(latents))
        if guidance is not None:
            named["guidance"] = torch.full_like(named["guidance"], guidance)
        output = self.denoiser(**{**named, "return_dict": False})[0].float()
        output = family.prediction(family.unpack(self.pipe, output, call), latents)
        scale = family.scale(self.pipe, timestep)
        return output if scale.kind == "flow" else scale.eps(output, latents.float())

    def _times(self, timestep: float, rows: int) -> Tensor:
        """The time as the pipeline gives it: rounded to its dtype, in its unit, one or one a row."""
        time = torch.full_like(self._time.flatten()[:1], timestep)
        time = time if self._divisor == 1 else time / self._divisor
        return time.expand(rows) if self._time.dim() else time[0]


def check_step(model: Replay) -> None:
    """See that the first step of the pipeline's own sampler is what the model's prediction says.

    The step is the first one of any deterministic sampler, x' = alpha' x0 + sigma' eps, from the latents and times that
    the denoiser was given in the pipeline's own call, to those that it is given next.

    Raises:
        InputError: it is another; the family's file would be wrong for this pipeline, or there is none.
    """
    pipe, family, seen = model.pipe, model.family, []

    def look(module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        named = family.named(args, kwargs)
        seen.append((family.unpack(pipe, named[family.latents], named).float(), named["timestep"].flatten()[0]))
        if len(seen) == 2:
            raise _Called(named)

    hook = model.denoiser.register_forward_pre_hook(look, with_kwargs=True)
    options = {"num_inference_steps": 4, "output_type": "latent", **family.unguided}
    try:
        pipe(prompt=list(PAIR), generator=torch.Generator().manual_seed(0), **options)
    except _Called:
        pass
    finally:
        hook.remove()
    (x, time), (after, later) = seen
    t, next_t = (float(one) * model._divisor for one in (time, later))
    with torch.no_grad():
        raw = model.predict_noise(x, t, model.embed(PAIR))
    scale, (alpha, sigma) = unit_of(cast(TextToImage, model), t), model.noise_scales(next_t)
    found = alpha * scale.x0(raw, x) + sigma * scale.eps(raw, x)
    if not (found - after).norm() <= 0.02 * (after - x).norm():  # NaN is not
        raise InputError(
            f"{type(pipe).__name__}: its sampler makes another step than its denoiser's output, read as that of "
            f"{family.name}, says; it needs a file of its own (docs/families.md)"
        )
