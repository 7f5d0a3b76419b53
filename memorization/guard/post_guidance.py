"""The guard as a function after guidance, for hosts that offer no pipeline; needs torch alone.

ComfyUI and Forge call ``set_model_sampler_post_cfg_function(fn, disable_cfg1_optimization=True)`` with a table:
``cond_denoised`` and ``uncond_denoised`` (x0 whatever the architecture), ``denoised`` (what guidance made of them),
``sigma`` and ``input``. What the function returns takes the place of ``denoised``.

Deviation from :func:`.protect`: a host draws its noise itself, so nothing is reseeded, and nobody tells the function
what the threshold was calibrated for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from memorization.errors import InputError
from memorization.guard.verdict import Refused, Verdict

HostAction = Literal["warn", "mitigate", "refuse"]
ACTIONS = ("warn", "mitigate", "refuse")
UNTIL = 2.75  # sigma / alpha of Stable Diffusion at t = 650, where static_transition lets guidance act


def pull(cond: Tensor, uncond: Tensor) -> Tensor:
    """D = || x0_c - x0_u || / sqrt(d), ``(rows,)``, of clean latents ``(rows, ...)``."""
    difference = (cond - uncond).float().flatten(1)
    return difference.norm(dim=1) / math.sqrt(difference.shape[1])


class PostGuidance:
    """Reads the score at the first step of each generation, where sigma is higher than before, and acts.

    Args:
        threshold: score from which on a picture is flagged.
        action: ``warn`` says so; ``mitigate`` draws without guidance until sigma is below ``until`` (static_transition,
            Jain et al., CVPR 2025); ``refuse`` raises :class:`.Refused`.
        say: what warnings go to.

    Attributes:
        verdicts: of the last generation, one a picture.

    Raises:
        InputError: there is no such action.
    """

    def __init__(
        self, threshold: float, action: HostAction = "warn", until: float = UNTIL, say: Callable[[str], object] = print
    ) -> None:
        if action not in ACTIONS:
            raise InputError(f"action = {action} is not one of {', '.join(ACTIONS)}")
        self.threshold, self.action, self.until, self.say = threshold, action, until, say
        self.verdicts: list[Verdict] = []
        self._last, self._flagged = 0.0, torch.zeros(0, dtype=torch.bool)

    def __call__(self, args: Mapping[str, Any]) -> Tensor:
        """What the sampler goes on with, ``(rows, ...)``."""
        cond, uncond, denoised = args["cond_denoised"], args["uncond_denoised"], args["denoised"]
        sigma = float(torch.as_tensor(args["sigma"]).flatten()[0])
        if sigma > self._last or len(self._flagged) != len(cond):
            self._read(cond, uncond)
        self._last = sigma
        if self.action != "mitigate" or sigma < self.until:
            return denoised
        rows = self._flagged.to(denoised.device).view(-1, *[1] * (denoised.dim() - 1))
        return torch.where(rows, uncond, denoised)

    def _read(self, cond: Tensor, uncond: Tensor) -> None:
        scores = pull(cond, uncond)
        self._flagged = (scores >= self.threshold).cpu()
        done = {"warn": "drawn as it is", "mitigate": f"no guidance until sigma {self.until:g}", "refuse": "refused"}
        self.verdicts = [
            Verdict(row, float(f"{score:.6g}"), self.threshold, "given by the caller", flagged=flagged,
                    action=self.action if flagged else "none", done=done[self.action] if flagged else "")
            for row, (score, flagged) in enumerate(zip(scores.tolist(), self._flagged.tolist(), strict=True))
        ]  # fmt: skip
        found = [verdict for verdict in self.verdicts if verdict.flagged]
        if found and self.action == "refuse":
            self._last = 0.0  # the next call is another generation's
            raise Refused(found)
        for verdict in found:
            self.say(str(verdict))


def guard_model(model: Any, threshold: float, action: HostAction) -> PostGuidance:
    """Put the guard on a host's model patcher; it lives as long as that does."""
    guard = PostGuidance(threshold, action)
    model.set_model_sampler_post_cfg_function(guard, disable_cfg1_optimization=True)
    return guard
