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
from transformers import CLIPImageProcessorPil, CLIPModel

from memorization.errors import InputError
from memorization.models.checkpoint import (
    fetch_part,
    find_folder,
    identity_of,
    in_short,
    load_network,
    load_tokenizer,
    read_config,
)


class Clip:
    """Embeds pictures and prompts in one space.

    Args:
        identifier: a folder or a hub id.

    Attributes:
        revision: tells its files from every other's.

    Raises:
        InputError: a file is missing or damaged, or they do not belong together.
    """

    def __init__(self, identifier: str, device: torch.device | str = "cpu") -> None:
        self.name = Path(identifier).name
        folder = find_folder([identifier], lambda name: fetch_part(name, "", "model"))
        self.model = load_network(CLIPModel, folder).to(device)
        self.tokenizer, self.processor = load_tokenizer(folder), self._load_processor(folder)
        self.revision = identity_of(folder, [""])["files"]
        if not self.tokenizer.model_max_length <= self.model.config.text_config.max_position_embeddings:
            raise InputError(f"{folder}/tokenizer_config.json: model_max_length = {self.tokenizer.model_max_length} is "
                             f"more than the model has positions")  # fmt: skip

    def _load_processor(self, folder: Path) -> CLIPImageProcessorPil:
        """What prepares pictures for the model."""
        path, side = folder / "preprocessor_config.json", self.model.config.vision_config.image_size
        read_config(path)
        try:
            processor = CLIPImageProcessorPil.from_pretrained(folder, local_files_only=True)
            prepared = processor(np.zeros((side + 1, side + 1, 3), np.uint8), return_tensors="pt").pixel_values
        except Exception as error:  # whatever a value of the config does to it
            raise InputError(f"{path}: cannot be read ({in_short(error)})") from None
        if prepared.shape[-2:] != (side, side) and processor.do_resize:
            raise InputError(f"{path}: makes pictures of {prepared.shape[-1]} pixels, the model takes {side}")
        return processor

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
