"""CLIP score: cosine of the embeddings of a picture and of a prompt (Hessel et al., EMNLP 2021, without its factor).

Any CLIP checkpoint in safetensors; the model's config names its own. The testbeds have theirs, trained on their kind of
pictures (testbed/models/clip).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate, normalize
from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

from memorization.errors import InputError


class Clip:
    """Embeds pictures and prompts in one space.

    Args:
        identifier: a folder or a hub id.

    Raises:
        InputError: it cannot be loaded.
    """

    def __init__(self, identifier: str, device: torch.device | str = "cpu") -> None:
        self.name = Path(identifier).name
        try:
            self.model = CLIPModel.from_pretrained(identifier, dtype=torch.float32, use_safetensors=True)
            self.model.to(device).eval().requires_grad_(False)
            self.processor = CLIPImageProcessorPil.from_pretrained(identifier)
            self.tokenizer = CLIPTokenizer.from_pretrained(identifier)
        except Exception as error:  # transformers, the hub client and safetensors each raise their own kinds
            reason = " ".join(str(error).split())[:200]
            raise InputError(f"{identifier}: cannot be loaded as a CLIP model in safetensors ({reason})") from None

    @torch.no_grad()
    def pictures(self, pictures: np.ndarray, at_once: int = 64) -> Tensor:
        """Unit vectors ``(n, width)`` of uint8 pictures ``(n, h, w, 3)``."""
        parts = []
        for start in range(0, len(pictures), at_once):
            pixels = self.processor(list(pictures[start : start + at_once]), return_tensors="pt").pixel_values
            vision = self.model.vision_model(pixels.to(self.model.device)).pooler_output
            parts.append(self.model.visual_projection(vision))
        return normalize(torch.cat(parts), dim=1).cpu()

    def describe(self, pictures: Tensor) -> Tensor:
        """Unit vectors ``(n, width)`` of pictures ``(n, 3, h, w)`` in [-1, 1], on their device; differentiable.

        The same preparation as :meth:`pictures`, but for the rounding of resized pixels to bytes, and it squeezes a
        picture to the model's size instead of cropping it.
        """
        vision_config: Any = self.model.config.vision_config
        side = vision_config.image_size
        if tuple(pictures.shape[-2:]) != (side, side):
            pictures = interpolate(pictures, (side, side), mode="bicubic", antialias=True)
        mean, std = (
            torch.tensor(values, device=pictures.device)[:, None, None]
            for values in (self.processor.image_mean, self.processor.image_std)
        )
        vision = self.model.to(pictures.device).vision_model(((pictures / 2 + 0.5) - mean) / std).pooler_output
        return normalize(self.model.visual_projection(vision), dim=1)

    @torch.no_grad()
    def prompts(self, prompts: Sequence[str]) -> Tensor:
        """Unit vectors ``(n, width)`` of prompts."""
        length = self.tokenizer.model_max_length
        tokens = self.tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=length, return_tensors="pt"
        )
        text = self.model.text_model(tokens.input_ids.to(self.model.device)).pooler_output
        return normalize(self.model.text_projection(text), dim=1).cpu()
