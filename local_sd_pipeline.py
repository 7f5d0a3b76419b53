"""Stable Diffusion with its noise predictions laid open.

``LocalStableDiffusionPipeline`` is diffusers' ``StableDiffusionPipeline`` with four more methods: embed prompts, draw
seeded pure noise, predict noise, and trace a batch of prompts. What it saves, plain diffusers loads. This file needs
torch and diffusers alone, so it also works as ``DiffusionPipeline.from_pretrained(model,
custom_pipeline="local_sd_pipeline.py", trust_remote_code=True)``.
"""

import json
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from torch import Tensor

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")


class Scale(NamedTuple):
    """What a model's output means where x_t = alpha * x0 + sigma * eps.

    Every conversion is linear, so that differences of outputs convert by the same rules with x = 0.

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

    def v(self, output: Tensor, x: Tensor) -> Tensor:
        """alpha * eps - sigma * x0, the v of variance-preserving models."""
        return (
            output
            if self.kind == "v_prediction"
            else self.alpha * self.eps(output, x) - self.sigma * self.x0(output, x)
        )

    def velocity(self, output: Tensor, x: Tensor) -> Tensor:
        """eps - x0, the velocity of a flow."""
        return output if self.kind == "flow" else self.eps(output, x) - self.x0(output, x)

    def output(self, eps: Tensor, x: Tensor) -> Tensor:
        """The output that implies a noise: :meth:`eps`, the other way. Of a flow it does not exist where alpha is 0."""
        if self.kind == "epsilon":
            return eps
        if self.kind == "v_prediction":
            return (eps - self.sigma * x) / self.alpha
        return (x - self.sigma * eps) / self.alpha if self.kind == "sample" else (eps - x) / self.alpha

    def pull(self, uncond: Tensor, cond: Tensor) -> Tensor:
        """D = || x0_c - x0_u || / sqrt(d), ``(...)``, of outputs ``(..., c, h, w)``: the root mean square difference.

        At a fixed timestep of a model that is no flow it is the norm of Wen et al. (noise_norm) times a constant. It is
        taken in x0 since differences of eps are 0 at the first step of a flow, whatever the model does.
        """
        difference = (cond - uncond).float()
        clean = self.x0(difference, torch.zeros_like(difference))  # conversions are linear: x cancels
        clean = clean.flatten(max(1, clean.dim() - 3))  # packed latents have two axes, a row and they make three
        return clean.norm(dim=-1) / clean.shape[-1] ** 0.5

    def norm(self, uncond: Tensor, cond: Tensor) -> Tensor:
        """The magnitude of a guidance vector ``(..., c, h, w)``: || eps_c - eps_u ||, and of a flow :meth:`pull`."""
        if self.kind == "flow":
            return self.pull(uncond, cond)
        none = torch.zeros_like(cond)
        return (self.eps(cond, none) - self.eps(uncond, none)).flatten(-3).norm(dim=-1)

    def norm_of(self, pull: float, numbers: int) -> float:
        """The norm || eps_c - eps_u || of a latent of so many ``numbers`` that belongs to a pull."""
        return pull * numbers**0.5 * self.alpha / self.sigma


class NoisePrediction(NamedTuple):
    """Conditional and unconditional predictions at one timestep, in float32.

    They are eps, whatever the checkpoint predicts. A flow's (of other pipelines, which are traced in the same way) are
    its velocity: eps = x at its first step, so that it says nothing there.

    Attributes:
        timestep: the timestep t.
        latents: what went in, ``(images, c, h, w)``.
        uncond: of the empty prompt, ``(images, c, h, w)``.
        cond: of each prompt, ``(prompts, noises, c, h, w)``.
        alpha: sqrt(abar_t); of a flow 1 - sigma.
        sigma: sqrt(1 - abar_t).
        prediction_type: what the checkpoint itself predicts: ``epsilon``, ``v_prediction``, ``sample`` or ``flow``.
    """

    timestep: int
    latents: Tensor
    uncond: Tensor
    cond: Tensor
    alpha: float
    sigma: float
    prediction_type: str

    @property
    def scale(self) -> Scale:
        """What ``uncond`` and ``cond`` mean."""
        return Scale("flow" if self.prediction_type == "flow" else "epsilon", self.alpha, self.sigma)

    @property
    def guidance(self) -> Tensor:
        """The guidance vector d = cond - uncond, ``(prompts, noises, c, h, w)``."""
        return self.cond - self.uncond

    @property
    def norm(self) -> Tensor:
        """|| eps_c - eps_u ||, ``(prompts, noises)``; of a flow || x0_c - x0_u || / sqrt(d), see :meth:`Scale.pull`."""
        return self.scale.norm(self.uncond, self.cond)

    @property
    def eps(self) -> tuple[Tensor, Tensor]:
        """The noise, (unconditional, conditional)."""
        return self._both(self.scale.eps)

    @property
    def x0(self) -> tuple[Tensor, Tensor]:
        """The clean latents, (unconditional, conditional)."""
        return self._both(self.scale.x0)

    @property
    def v(self) -> tuple[Tensor, Tensor]:
        """alpha * eps - sigma * x0, (unconditional, conditional)."""
        return self._both(self.scale.v)

    @property
    def velocity(self) -> tuple[Tensor, Tensor]:
        """eps - x0, (unconditional, conditional)."""
        return self._both(self.scale.velocity)

    def _both(self, convert: Callable[[Tensor, Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        return convert(self.uncond, self.latents), convert(self.cond, self.latents)


class UnconditionalPrediction(NamedTuple):
    """What does not depend on the prompts: the empty prompt's embedding ``(1, ...)`` and its prediction
    ``(images, c, h, w)`` at each timestep (``eps``, or a flow's velocity)."""

    embedding: Tensor
    eps: dict[int, Tensor]


class Traced:
    """Embeddings and traces of any model that encodes prompts and predicts.

    Attributes:
        contrast: what stands for no prompt, in words, where it is not simply the empty prompt.
    """

    contrast: str | None = None
    prediction_type: str
    _encode: Callable[[Sequence[str]], Tensor]
    predict_noise: Callable[[Tensor, Any, Tensor], Tensor]
    noise_scales: Callable[[Any], tuple[float, float]]

    def embed(self, prompts: Sequence[str]) -> Tensor:
        """Embeddings of ``prompts``, a row each: ``(prompts, tokens, width)`` where one text encoder's states are all.

        All blank prompts get one and the same embedding, to the bit, whatever else is in the batch: the guidance vector
        of an empty prompt is exactly zero.
        """
        written = [i for i, prompt in enumerate(prompts) if prompt.strip()]
        if len(written) == len(prompts):
            return self._encode(prompts)
        embedded = self._encode_blank().repeat_interleave(len(prompts), 0)
        if written:
            embedded[written] = self._encode([prompts[i] for i in written])
        return embedded

    def _encode_blank(self) -> Tensor:
        return self._encode([""])

    def parts(self, embeds: Tensor) -> dict[str, Tensor]:
        """What embeddings are to a pipeline's ``__call__``, by the names of its arguments."""
        return {"prompt_embeds": embeds}

    def given(self, embeds: Tensor | None, latents: Tensor | None) -> dict[str, Tensor]:
        """What a pipeline's ``__call__`` takes instead of a prompt and its own start noise, by the names of its
        arguments; nothing for what is None."""
        found = {} if embeds is None else self.parts(embeds)
        return found if latents is None else {**found, "latents": latents}

    def free(self, embeds: Tensor) -> Tensor:
        """Which numbers of embeddings may be changed, ones and zeros, ``(1, ...)``."""
        return torch.ones_like(embeds[:1])

    def predict_pairs(self, latents: Tensor, timestep: int, prompt_embeds: Tensor, batch_size: int) -> Tensor:
        """What :meth:`predict_noise` says of every prompt on every latent, ``(prompts, noises, c, h, w)``."""
        images = len(latents)
        pairs = torch.arange(len(prompt_embeds) * images, device=latents.device)
        rows = [
            self.predict_noise(latents[chunk % images], timestep, prompt_embeds[chunk // images])
            for chunk in pairs.split(batch_size)
        ]
        return torch.cat(rows).unflatten(0, (-1, images))

    def predict_uncond(self, latents: Tensor, timesteps: Sequence[int], batch_size: int = 8) -> UnconditionalPrediction:
        """eps of the empty prompt at each timestep. It depends on no prompt: compute it once a run."""
        empty = self.embed([""])
        return UnconditionalPrediction(
            empty, {t: self.predict_pairs(latents, t, empty, batch_size)[0] for t in timesteps}
        )

    def trace(
        self,
        prompt_embeds: Tensor,
        latents: Tensor,
        timesteps: Sequence[int],
        uncond: UnconditionalPrediction | None = None,
        batch_size: int = 8,
    ) -> dict[int, NoisePrediction]:
        """Noise predictions of all prompts on the same latents at each timestep: what every one-step detector reads.

        Args:
            prompt_embeds: ``(prompts, ...)`` from :meth:`embed`.
            latents: ``(images, c, h, w)``; the same latents go in at every timestep.
            timesteps: timesteps t of the training schedule.
            uncond: from :meth:`predict_uncond` on the same latents; computed here if missing.
            batch_size: rows (prompt-image pairs) to a call of the denoiser.
        """
        if uncond is None:
            uncond = self.predict_uncond(latents, timesteps, batch_size)
        blank = (prompt_embeds == uncond.embedding).flatten(1).all(1)[:, None, None, None, None]
        result = {}
        for t in timesteps:
            cond = self.predict_pairs(latents, t, prompt_embeds, batch_size)
            # The same rows in a batch of another size may differ in the last bits; for a blank prompt d must be 0.
            cond = torch.where(blank, uncond.eps[t], cond)
            scales = self.noise_scales(t)
            result[t] = NoisePrediction(t, latents.float(), uncond.eps[t], cond, *scales, self.prediction_type)
        return result


class LocalStableDiffusionPipeline(Traced, StableDiffusionPipeline):
    """``StableDiffusionPipeline`` with access to its noise predictions, whatever its prediction type.

    Attributes:
        can: what methods may ask of it besides (memorization/models/base.py has the words).
        onload: where networks that wait elsewhere are brought when they are called; None where none do.
    """

    can = frozenset({"text", "attention", "pictures", "eps"})
    onload: torch.device | None = None

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.onload or super().device

    @property
    def denoiser(self) -> Any:
        """What predicts."""
        return self.unet

    @property
    def prediction_type(self) -> str:
        """What the checkpoint predicts."""
        return self.scheduler.config.prediction_type

    def to_json_string(self) -> str:
        """What ``save_pretrained`` writes as model_index.json: plain diffusers knows this class's base alone."""
        config = json.loads(super().to_json_string())
        config["_class_name"] = StableDiffusionPipeline.__name__
        return json.dumps(config, indent=2, sort_keys=True) + "\n"

    def detection_timesteps(self, steps: int = 50) -> list[int]:
        """The DDIM grid the detectors are defined on: "leading" spacing, offset 1 (50 steps: 981, 961, ..., 1)."""
        scheduler = DDIMScheduler.from_config(self.scheduler.config, timestep_spacing="leading", steps_offset=1)
        scheduler.set_timesteps(steps)
        return scheduler.timesteps.tolist()

    def _encode(self, prompts: Sequence[str]) -> Tensor:
        return self.encode_prompt(list(prompts), self._execution_device, 1, do_classifier_free_guidance=False)[0]

    def pure_noise(self, num_images: int, seed: int) -> Tensor:
        """Start latents x_T ~ N(0, I), float32 ``(num_images, c, h, w)``, drawn on the CPU.

        Image i is the same for every ``num_images`` > i, every batch size and every device.
        """
        size = self.unet.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(num_images, self.unet.config.in_channels, height, width, generator=generator)
        return noise.to(self._execution_device)

    def noise_scales(self, timestep: int) -> tuple[float, float]:
        """(alpha, sigma) = (sqrt(abar_t), sqrt(1 - abar_t))."""
        alpha_bar = self.scheduler.alphas_cumprod[timestep].item()
        return alpha_bar**0.5, (1 - alpha_bar) ** 0.5

    def to_eps(self, output: Tensor, latents: Tensor, timestep: int) -> Tensor:
        """The noise prediction behind a model output of any prediction type.

        Raises:
            ValueError: for a prediction type other than epsilon, v_prediction and sample.
        """
        kind: Any = self.prediction_type
        if kind not in PREDICTION_TYPES:
            raise ValueError(f"prediction type {kind!r} is not one of {PREDICTION_TYPES}")
        return Scale(kind, *self.noise_scales(timestep)).eps(output, latents)

    def predict_noise(self, latents: Tensor, timestep: int, prompt_embeds: Tensor) -> Tensor:
        """eps of a batch: ``latents (b, c, h, w)`` under ``prompt_embeds (b, tokens, width)``; float32."""
        dtype = self.unet.dtype
        output = self.unet(latents.to(dtype), timestep, encoder_hidden_states=prompt_embeds.to(dtype)).sample
        return self.to_eps(output.float(), latents.float(), timestep)
