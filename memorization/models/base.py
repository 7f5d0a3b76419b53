"""What detectors, mitigations and engines may ask of a model, whatever its family.

Three things answer to it: ``LocalStableDiffusionPipeline`` (Stable Diffusion 1 and 2), :class:`.replay.Replay` (any
other pipeline, by a file of memorization/models/families/), and whatever a test makes.

A prediction (:class:`Prediction`) knows x0_hat, eps, v and the flow velocity of one output. It is kept in the unit in
which it says something at every step: eps, and of a flow the velocity, since eps of a flow's first step is x_T itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, Protocol, TypeVar

import torch
from torch import Tensor

from local_sd_pipeline import NoisePrediction as Prediction
from local_sd_pipeline import Scale, UnconditionalPrediction
from memorization.errors import InputError

__all__ = ["ABILITIES", "Prediction", "Scale", "TextToImage", "check_able", "split_able", "unit_of"]

ABILITIES = {  # what a method may need that not every model can; the line that says what is missing
    "text": "one text encoder whose states, a row a token, are the whole embedding",
    "attention": "a UNet's cross-attention on the tokens",
    "pictures": "an autoencoder of the kind of Stable Diffusion's",
    "eps": "predictions that can be written as noise at every step (no flow)",
    "guidance": "a guidance scale that its denoiser is given",
}


class TextToImage(Protocol):
    """A model that denoises latents under prompts.

    Attributes:
        can: the keys of :data:`ABILITIES` that hold for it.
        prediction_type: ``epsilon``, ``v_prediction``, ``sample`` or ``flow``.
        denoiser: what predicts; ``unet`` is the same where it is one.
        contrast: what stands for no prompt, in words; None where it is simply the empty prompt.
        scheduler: its own; ``config.num_train_timesteps`` says how many timesteps there are.
    """

    can: frozenset[str]
    denoiser: Any
    unet: Any
    vae: Any
    tokenizer: Any
    text_encoder: Any
    scheduler: Any
    config: Any
    prediction_type: Any
    contrast: Any
    vae_scale_factor: Any

    @property
    def device(self) -> torch.device: ...

    def __hash__(self) -> int: ...

    def embed(self, prompts: Sequence[str]) -> Tensor:
        """``(prompts, ...)``, a row each. Where there is more to an embedding than the states of one text encoder
        (pooled states, masks), a row holds all of it and only the model knows where. A blank prompt's row is what
        guidance takes for no prompt."""
        ...

    def parts(self, embeds: Tensor) -> dict[str, Tensor]:
        """What embeddings are to the ``__call__`` of the pipeline, by the names of its arguments."""
        ...

    def given(self, embeds: Tensor | None, latents: Tensor | None) -> dict[str, Tensor]:
        """What the pipeline's ``__call__`` takes instead of a prompt and its own start noise ``(n, c, h, w)``; nothing
        for what is None, or where it is not known."""
        ...

    def free(self, embeds: Tensor) -> Tensor:
        """Which numbers of embeddings may be changed, ones and zeros, ``(1, ...)``."""
        ...

    def pure_noise(self, num_images: int, seed: int) -> Tensor:
        """x_T ~ N(0, I), float32 ``(num_images, c, h, w)``; image i does not depend on how many there are."""
        ...

    def detection_timesteps(self, steps: int = 50) -> list:
        """The grid of detectors and generations, noisiest first."""
        ...

    def noise_scales(self, timestep: Any) -> tuple[float, float]:
        """(alpha, sigma) of x_t = alpha x0 + sigma eps."""
        ...

    def predict_noise(self, latents: Tensor, timestep: Any, prompt_embeds: Tensor) -> Tensor:
        """eps, or a flow's velocity, of ``latents (b, c, h, w)`` under embeddings ``(b, ...)``; float32."""
        ...

    def predict_uncond(self, latents: Tensor, timesteps: Sequence[int], batch_size: int = 8) -> UnconditionalPrediction:
        """The same of no prompt, at each timestep."""
        ...

    def trace(
        self, prompt_embeds: Tensor, latents: Tensor, timesteps: Sequence[int],
        uncond: UnconditionalPrediction | None = None, batch_size: int = 8,
    ) -> dict[int, Prediction]:  # fmt: skip
        """Predictions of all prompts on the same latents at each timestep."""
        ...


def unit_of(pipe: TextToImage, timestep: Any) -> Scale:
    """What ``predict_noise`` gives at a timestep."""
    return Scale("flow" if pipe.prediction_type == "flow" else "epsilon", *pipe.noise_scales(timestep))


class Method(Protocol):
    """What says what it asks of a model: detectors, mitigations, maps."""

    name: ClassVar[str]
    asks: ClassVar[tuple[str, ...]]  # keys of ABILITIES


M = TypeVar("M", bound=Method)


def split_able(pipe: TextToImage, methods: Iterable[M]) -> tuple[list[M], list[str]]:
    """(the methods that a model can do, a line for each thing that it has not, with those that need it)."""
    able, lacking = [], {}
    for method in methods:
        missing = [ABILITIES[key] for key in sorted(set(method.asks) - pipe.can)]
        if missing:
            lacking.setdefault(" and ".join(missing), []).append(method.name)
        else:
            able.append(method)
    return able, [f"{', '.join(names)}: needs {what}, which this model has not" for what, names in lacking.items()]


def check_able(pipe: TextToImage, methods: Iterable[Method]) -> None:
    """See that a model can do all of ``methods``.

    Raises:
        InputError: it cannot; names the method and what is missing.
    """
    if lines := split_able(pipe, methods)[1]:
        raise InputError(lines[0])
