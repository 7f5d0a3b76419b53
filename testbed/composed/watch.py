"""What is watched while a diffusion model is trained: copies, what the scores see, and whether it draws."""

from __future__ import annotations

import numpy as np
import torch
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline
from sklearn.metrics import roc_auc_score
from torch import Tensor
from torch.nn.functional import cosine_similarity

from testbed.composed import scenes
from testbed.composed.captions import FIXED, Visits
from testbed.composed.copies import copy_distance
from testbed.composed.judge import Judge
from testbed.composed.scenes import NAMED

A_LEVEL = 12  # captions of each kind and level
STEPS, GUIDANCE, NOISE_SEED = 10, 3.0, 1234
HIGH, LOW = 981, 41
COPY = 1.0  # nL2 of the fixed part, see copies.py


class Watch:
    """Numbers of a pipeline: replication by kind and level, AUC of norm and cosine, what the judge sees."""

    def __init__(self, visits: Visits, place) -> None:
        captions, rows = visits.captions, visits.rows
        self.level = visits.level
        chosen = captions.groupby(["kind", self.level]).head(A_LEVEL).index
        self.captions, self.rows, self.device = captions.loc[chosen].reset_index(drop=True), rows[chosen], place.device
        self.autocast = place.autocast
        self.judge = Judge(place.models / "clip", place.device)

    @torch.no_grad()
    def __call__(self, pipe: StableDiffusionPipeline) -> dict:
        """What is logged; flat, so that a row of it is a row of a table."""
        with self.autocast():
            pictures = self._generate(pipe)
            features = self._features(pipe)
        result = {}
        copies = self._copies(pictures)
        for (kind, level), part in self.captions.groupby(["kind", self.level]):
            places = part.index.to_numpy()
            if kind in FIXED:
                result[f"copies {kind} {level}"] = round(copies[places].float().mean().item(), 3)
                for name, value in features.items():
                    ordinary = np.flatnonzero(self.captions["kind"] == "ordinary")
                    both = np.concatenate([places, ordinary])
                    truth = np.arange(len(both)) < len(places)
                    result[f"{name} {kind} {level}"] = round(roc_auc_score(truth, value[both]), 3)
        for kind in ("held-out", "ordinary", "verbatim"):
            places = np.flatnonzero(self.captions["kind"] == kind)
            seen = self.judge.accuracy(
                pictures[places], self.rows[places, : len(NAMED)], self.captions["named"][places]
            )
            result |= {f"{kind} {name}": value for name, value in seen.items()}
        return result

    def _generate(self, pipe) -> Tensor:
        """One picture a caption, ``(n, 3, h, w)`` in [-1, 1]."""
        pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
        pipe.set_progress_bar_config(disable=True)
        prompts = self.captions["prompt"].tolist()
        generator = torch.Generator().manual_seed(NOISE_SEED)
        shape = (len(prompts), pipe.vae.config.latent_channels, 16, 16)
        noise = torch.randn(shape, generator=generator).to(self.device)
        pictures = pipe(prompts, latents=noise, num_inference_steps=STEPS, guidance_scale=GUIDANCE,
                        height=scenes.SIZE, width=scenes.SIZE, output_type="pt").images  # fmt: skip
        return pictures.float() * 2 - 1

    def _copies(self, pictures: Tensor) -> Tensor:
        """Which pictures copy what is fixed of their captions, ``(n,)``."""
        near = torch.full((len(pictures),), torch.inf)
        for i, kind in enumerate(self.captions["kind"]):
            if kind in FIXED:
                near[i] = copy_distance(pictures[i : i + 1], self.rows[i], kind).item()
        return near < COPY

    def _features(self, pipe) -> dict[str, np.ndarray]:
        """Norm of d at high noise and official cosine at low noise, both on pure noise."""
        ids = pipe.tokenizer([*self.captions["prompt"], ""], padding="max_length", return_tensors="pt").input_ids
        text = pipe.text_encoder(ids.to(self.device)).last_hidden_state
        x = torch.randn(1, pipe.unet.config.in_channels, 16, 16, generator=torch.Generator().manual_seed(51))
        x = x.to(self.device)

        def eps(t: int) -> tuple[Tensor, Tensor]:
            output = pipe.unet(x.expand(len(text), -1, -1, -1), t, text).sample.float()
            if pipe.scheduler.config.prediction_type == "v_prediction":
                a = pipe.scheduler.alphas_cumprod[t].sqrt().item()
                output = a * output + (1 - a * a) ** 0.5 * x
            return output[:-1], output[-1:]

        cond, uncond = eps(HIGH)
        norm = (cond - uncond).flatten(1).norm(dim=1)
        cond, uncond = eps(LOW)
        cosine = cosine_similarity(cond - uncond, uncond.expand_as(cond), dim=1).mean((1, 2))
        return {"norm": norm.cpu().numpy(), "cosine": cosine.cpu().numpy()}
