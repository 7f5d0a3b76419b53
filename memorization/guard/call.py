"""One call of the denoiser, as the pipeline made it: read, and made again for some of its pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from local_sd_pipeline import Scale
from memorization.models.families.base import Family, take


@dataclass
class Call:
    """A denoiser call of ``count`` pictures: as many rows, or twice as many where guidance is on.

    Args:
        named: its arguments by name.
        scale: what its output means.

    Attributes:
        asked: how many further calls were made for it.
    """

    pipe: Any
    family: Family
    denoiser: nn.Module
    named: dict[str, Any]
    scale: Scale
    guided: bool
    asked: int = 0

    @property
    def latents(self) -> Tensor:
        """The denoiser's input, ``(count, ...)``, without the copies for guidance."""
        return self.named[self.family.latents][: self.count]

    @property
    def rows(self) -> int:
        """Of the call."""
        return len(self.named[self.family.latents])

    @property
    def count(self) -> int:
        """Of the pictures."""
        return self.rows // 2 if self.guided else self.rows

    def output(self) -> Tensor:
        """Ask the denoiser."""
        self.asked += 1
        return self.denoiser(**{**self.named, "return_dict": False})[0]

    def of(self, rows: Sequence[int], latents: Tensor | None = None, condition: list[Tensor] | None = None) -> Call:
        """The same of some pictures.

        Args:
            latents: the denoiser's input, ``(len(rows), ...)``, instead of theirs.
            condition: of the prompts, instead of theirs.
        """
        named = take(self.named, self.places(rows), self.rows)
        halves = 2 if self.guided else 1
        if latents is not None:
            named[self.family.latents] = torch.cat([latents] * halves)
        if condition is not None:
            own = self.family.condition(named)
            kept = [one[: len(rows)] for one in own] if self.guided else [one[:0] for one in own]
            joined = [torch.cat([left, right.to(left)]) for left, right in zip(kept, condition, strict=True)]
            named = self.family.conditioned(named, joined)
        return replace(self, named=named, asked=0)

    def move(self, row: int, latents: Tensor) -> None:
        """Give a picture another input ``(c, h, w)``; the pipeline's own tensor stays as it is."""
        moved = self.named[self.family.latents].clone()
        moved[self.places([row])] = latents.to(moved)
        self.named = {**self.named, self.family.latents: moved}

    def places(self, rows: Sequence[int]) -> list[int]:
        """The rows of the call that belong to some pictures."""
        return [*rows, *(row + self.count for row in rows)] if self.guided else list(rows)

    def pair(self, output: Tensor) -> tuple[Tensor, Tensor]:
        """(unconditional, conditional) outputs ``(count, ...)``, float32.

        The pipeline's own, where guidance is on and goes out from the empty prompt. Else (no guidance, or a negative
        prompt, which is no measure of what the prompt does) one further call.
        """
        output = output.float()
        condition = self.family.condition(self.named)
        own = [one[: self.count] for one in condition] if self.guided else None
        empty = [one.expand(self.count, *one.shape[1:]) for one in self.family.empty(self.pipe, own)]
        if own is not None and self.family.same(own, empty):
            uncond, cond = output.chunk(2)
            return uncond, cond
        alone = take(self.named, self.places(range(self.count))[-self.count :], self.rows)
        alone = self.family.conditioned(
            alone, [one.to(like) for one, like in zip(empty, self.family.condition(alone), strict=True)]
        )
        self.asked += 1
        return self.denoiser(**{**alone, "return_dict": False})[0].float(), output[-self.count :]

    def merged(self, output: Tensor, rows: Sequence[int], other: Tensor) -> Tensor:
        """``output`` of the whole call with that of some pictures in its place."""
        merged = output.clone()
        merged[self.places(rows)] = other.to(output)
        return merged
