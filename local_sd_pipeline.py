"""Stable Diffusion with its noise predictions laid open.

``LocalStableDiffusionPipeline`` is diffusers' ``StableDiffusionPipeline`` with four more methods: embed prompts, draw
seeded pure noise, predict noise, and trace a batch of prompts. What it saves, plain diffusers loads. This file needs
torch and diffusers alone, so it also works as ``DiffusionPipeline.from_pretrained(model,
custom_pipeline="local_sd_pipeline.py", trust_remote_code=True)``.
"""

import json
from collections.abc import Sequence
from typing import NamedTuple

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from torch import Tensor

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")


class NoisePrediction(NamedTuple):
    """Conditional and unconditional noise predictions at one timestep, in float32.

    Attributes:
        timestep: the timestep t.
        latents: what went in, ``(images, c, h, w)``.
        uncond: eps of the empty prompt, ``(images, c, h, w)``.
        cond: eps of each prompt, ``(prompts, noises, c, h, w)``.
        alpha: sqrt(abar_t).
        sigma: sqrt(1 - abar_t).
        prediction_type: what the checkpoint itself predicts: ``epsilon``, ``v_prediction`` or ``sample``.
    """

    timestep: int
    latents: Tensor
    uncond: Tensor
    cond: Tensor
    alpha: float
    sigma: float
    prediction_type: str

    @property
    def guidance(self) -> Tensor:
        """The guidance vector d = eps_c - eps_u, ``(prompts, noises, c, h, w)``."""
        return self.cond - self.uncond


class UnconditionalPrediction(NamedTuple):
    """What does not depend on the prompts: the empty prompt's embedding ``(1, tokens, width)`` and its eps
    ``(images, c, h, w)`` at each timestep."""

    embedding: Tensor
    eps: dict[int, Tensor]


class LocalStableDiffusionPipeline(StableDiffusionPipeline):
    """``StableDiffusionPipeline`` with access to its noise predictions, whatever its prediction type."""

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

    def embed(self, prompts: Sequence[str]) -> Tensor:
        """Text-encoder states of ``prompts``, ``(prompts, tokens, width)``, in the text encoder's dtype.

        All blank prompts get one and the same embedding, to the bit, whatever else is in the batch: the guidance vector
        of an empty prompt is exactly zero.
        """
        written = [i for i, prompt in enumerate(prompts) if prompt.strip()]
        if len(written) == len(prompts):
            return self._encode(prompts)
        embedded = self._encode([""]).repeat(len(prompts), 1, 1)
        if written:
            embedded[written] = self._encode([prompts[i] for i in written])
        return embedded

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
        alpha, sigma = self.noise_scales(timestep)
        kind = self.scheduler.config.prediction_type
        if kind == "epsilon":
            return output
        if kind == "v_prediction":
            return alpha * output + sigma * latents
        if kind == "sample":
            return (latents - alpha * output) / sigma
        raise ValueError(f"prediction type {kind!r} is not one of {PREDICTION_TYPES}")

    def predict_noise(self, latents: Tensor, timestep: int, prompt_embeds: Tensor) -> Tensor:
        """eps of a batch: ``latents (b, c, h, w)`` under ``prompt_embeds (b, tokens, width)``; float32."""
        dtype = self.unet.dtype
        output = self.unet(latents.to(dtype), timestep, encoder_hidden_states=prompt_embeds.to(dtype)).sample
        return self.to_eps(output.float(), latents.float(), timestep)

    def predict_pairs(self, latents: Tensor, timestep: int, prompt_embeds: Tensor, batch_size: int) -> Tensor:
        """eps of every prompt on every latent, ``(prompts, noises, c, h, w)``, ``batch_size`` rows to a UNet call."""
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
            prompt_embeds: ``(prompts, tokens, width)`` from :meth:`embed`.
            latents: ``(images, c, h, w)``; the same latents go in at every timestep.
            timesteps: timesteps t of the training schedule.
            uncond: from :meth:`predict_uncond` on the same latents; computed here if missing.
            batch_size: rows (prompt-image pairs) to a UNet call.
        """
        if uncond is None:
            uncond = self.predict_uncond(latents, timesteps, batch_size)
        blank = (prompt_embeds == uncond.embedding).flatten(1).all(1)[:, None, None, None, None]
        result = {}
        for t in timesteps:
            cond = self.predict_pairs(latents, t, prompt_embeds, batch_size)
            # The same rows in a batch of another size may differ in the last bits; for a blank prompt d must be 0.
            cond = torch.where(blank, uncond.eps[t], cond)
            kind = self.scheduler.config.prediction_type
            result[t] = NoisePrediction(t, latents.float(), uncond.eps[t], cond, *self.noise_scales(t), kind)
        return result
