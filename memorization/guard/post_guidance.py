"""The guard as a function after guidance, for hosts that offer no pipeline; needs torch alone.

ComfyUI and Forge call ``set_model_sampler_post_cfg_function(fn, disable_cfg1_optimization=True)`` with a table:
``cond_denoised`` and ``uncond_denoised`` (x0 whatever the architecture), ``denoised`` (what guidance made of them),
``sigma``, ``input``, ``model_options``, and ``cond`` and ``uncond``, of which the latter is None where there is nothing
to guide away from. What the function returns takes the place of ``denoised``. Nobody says where a generation begins:
:class:`Starts` finds it.

Deviation from :func:`.protect`: a host draws its noise itself, so nothing is reseeded, and nobody tells the function
what the threshold was calibrated for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from memorization.errors import InputError
from memorization.guard.verdict import Refused, Verdict

HostAction = Literal["warn", "mitigate", "refuse"]
ACTIONS = ("warn", "mitigate", "refuse")
UNTIL = 2.75  # sigma / alpha of Stable Diffusion at t = 650, where static_transition lets guidance act
CHURN = 1.5  # by more than this no sampler adds noise between two steps: those of k-diffusion by at most a root of 2


def pull(cond: Tensor, uncond: Tensor) -> Tensor:
    """D = || x0_c - x0_u || / sqrt(d), ``(rows,)``, of clean latents ``(rows, ...)``."""
    difference = (cond - uncond).float().flatten(1)
    return difference.norm(dim=1) / math.sqrt(difference.shape[1])


@dataclass
class Starts:
    """Tells the first call of a generation from its later ones, of which some have the same sigma, or a higher one.

    ComfyUI puts the sigmas of a sampling into ``model_options``, a tensor of its own each time: another one is another
    generation. The same one, as a node may keep it, is used again where sigma is back at its start. Other hosts say
    nothing (Forge, where the guard is put on anew for every sampling): there sigma tells, by going back to its start or
    rising by more than churn.

    What is not told apart: where nothing is said, a generation that is broken off in its first step, or has one step
    alone, from the next of the same sigma, and samplers that restart at a higher sigma from new generations. Where the
    same tensor comes again, generations of one step.

    Attributes:
        start, last: sigma of the first call, and of the last.
        rows: pictures of the generation.
        schedule: its sigmas, where the host says them.
    """

    start: float = 0.0
    last: float = 0.0
    rows: int = 0
    schedule: object = None

    def __call__(self, sigma: float, rows: int, schedule: object) -> bool:
        """Whether a call is the first of a generation."""
        again = sigma >= self.start > self.last
        risen = schedule is None and sigma > CHURN * self.last
        first = rows != self.rows or schedule is not self.schedule or again or risen
        if first:
            self.start, self.rows, self.schedule = sigma, rows, schedule
        self.last = sigma
        return first


def schedule_of(args: Mapping[str, Any]) -> object:
    """The sigmas of a generation, where the host says them; None elsewhere."""
    options = args.get("model_options") or {}
    return (options.get("transformer_options") or {}).get("sample_sigmas")


class PostGuidance:
    """Reads the score at the first call of each generation (:class:`Starts`), and acts.

    A threshold is of one sigma: the verdict says at which sigma it was read. A generation that begins at a lower one
    (from a picture, or the second of two samplers) pulls less. One without an unconditional half, and a
    picture with a score that is not finite, is not judged, which is said.

    Args:
        threshold: score from which on a picture is flagged.
        action: ``warn`` says so; ``mitigate`` draws without guidance until sigma is below ``until`` (static_transition,
            Jain et al., CVPR 2025); ``refuse`` raises :class:`.Refused`.
        say: what warnings go to.

    Attributes:
        verdicts: of the last generation, one a picture that was judged.

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
        self._starts, self._flagged = Starts(), torch.zeros(0, dtype=torch.bool)

    def __call__(self, args: Mapping[str, Any]) -> Tensor:
        """What the sampler goes on with, ``(rows, ...)``."""
        cond, uncond, denoised = args["cond_denoised"], args["uncond_denoised"], args["denoised"]
        sigma = float(torch.as_tensor(args["sigma"]).flatten()[0])
        if self._starts(sigma, len(cond), schedule_of(args)):
            self._read(cond, None if args.get("uncond", cond) is None else uncond, sigma)
        if self.action != "mitigate" or sigma < self.until:
            return denoised
        rows = self._flagged.to(denoised.device).view(-1, *[1] * (denoised.dim() - 1))
        return torch.where(rows, uncond, denoised)

    def _read(self, cond: Tensor, uncond: Tensor | None, sigma: float) -> None:
        # Without an unconditional half the host gives zeros in its place.
        scores = torch.full((len(cond),), torch.nan) if uncond is None else pull(cond, uncond)
        finite = scores.isfinite()
        self._flagged = (finite & (scores >= self.threshold)).cpu()
        if uncond is None:
            self.say("the guard judges no picture of this generation: there is no unconditional prediction")
        for row in () if uncond is None else (~finite).nonzero().flatten().tolist():
            self.say(f"the guard does not judge picture {row}: its score is not finite")
        action, done = self._answer(sigma)
        source = f"given by the caller, read at sigma {sigma:.4g}"
        self.verdicts = [
            Verdict(row, float(f"{score:.6g}"), self.threshold, source, flagged=flagged,
                    action=action if flagged else "none", done=done if flagged else "")
            for row, (score, flagged) in enumerate(zip(scores.tolist(), self._flagged.tolist(), strict=True))
            if math.isfinite(score)
        ]  # fmt: skip
        found = [verdict for verdict in self.verdicts if verdict.flagged]
        if found and self.action == "refuse":
            self._starts = Starts()  # the next call is another generation's
            raise Refused(found)
        for verdict in found:
            self.say(str(verdict))

    def _answer(self, sigma: float) -> tuple[HostAction, str]:
        """What is done to flagged pictures of a generation that begins at ``sigma``, and in words."""
        if self.action == "mitigate" and sigma < self.until:
            return "warn", f"drawn as it is, since it begins below sigma {self.until:g}"
        done = {"warn": "drawn as it is", "mitigate": f"no guidance until sigma {self.until:g}", "refuse": "refused"}
        return self.action, done[self.action]


def guard_model(model: Any, threshold: float, action: HostAction) -> PostGuidance:
    """Put the guard on a host's model patcher; it lives as long as that does."""
    guard = PostGuidance(threshold, action)
    model.set_model_sampler_post_cfg_function(guard, disable_cfg1_optimization=True)
    return guard
