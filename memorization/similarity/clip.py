"""CLIP score: cosine of the embeddings of a picture and of a prompt (Hessel et al., EMNLP 2021, without its factor).

Any CLIP checkpoint in safetensors; the model's config names its own. The testbeds have theirs, trained on their kind of
pictures (testbed/models/clip).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize
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
            self.model = (
                CLIPModel.from_pretrained(identifier, dtype=torch.float32, use_safetensors=True).to(device).eval()
            )
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

    @torch.no_grad()
    def prompts(self, prompts: Sequence[str]) -> Tensor:
        """Unit vectors ``(n, width)`` of prompts."""
        length = self.tokenizer.model_max_length
        tokens = self.tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=length, return_tensors="pt"
        )
        text = self.model.text_model(tokens.input_ids.to(self.model.device)).pooler_output
        return normalize(self.model.text_projection(text), dim=1).cpu()
