"""What the guard knows of the generation that is under way, and what it does to its flagged pictures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from memorization.errors import InputError
from memorization.guard.call import Call
from memorization.guard.remedies import Applied, apply
from memorization.guard.thresholds import Threshold
from memorization.guard.verdict import Verdict
from memorization.mitigations.base import Levels, Mitigation


@dataclass(frozen=True)
class Plan:
    """What is done to flagged pictures.

    Attributes:
        actions: in turn, each for the pictures that are still flagged.
        steps: of a generation whose score is read; its mean counts.
        tries: other noises of ``reseed``.
        generator: of that noise; on the CPU, so that it is the same on every device.
        mitigation, levels: of ``mitigate``.
    """

    threshold: Threshold
    actions: Sequence[str]
    steps: int
    tries: int
    generator: torch.Generator
    mitigation: Mitigation | None = None
    levels: Levels = field(default_factory=dict)


@dataclass
class Generation:
    """One call of the pipeline, from the scheduler's timesteps to the picture.

    Attributes:
        index: of the step.
        awaited: whether the next call of the denoiser is the step's own.
        timesteps: of the steps whose score was read.
        moved: row -> start latents of the scheduler, instead of the pipeline's, until the first step is done.
        applied: row -> remedy.
        blank: rows of which nothing is drawn.
    """

    scheduler: Any
    prompts: Sequence[str] = ()
    index: int = 0
    awaited: bool = True
    pulls: list[Tensor] = field(default_factory=list)
    timesteps: list[float] = field(default_factory=list)
    verdicts: list[Verdict] = field(default_factory=list)
    moved: dict[int, Tensor] = field(default_factory=dict)
    applied: dict[int, Applied] = field(default_factory=dict)
    blank: set[int] = field(default_factory=set)

    @property
    def is_over(self) -> bool:
        """Whether all steps were made."""
        return self.index >= len(self.scheduler.timesteps)

    @property
    def timestep(self) -> float:
        """Of the step."""
        return float(self.scheduler.timesteps[self.index])

    def read(self, call: Call, output: Tensor) -> None:
        """Add the score of a step."""
        self.pulls.append(call.scale.pull(*call.pair(output)))
        self.timesteps.append(round(self.timestep, 3))

    @property
    def scores(self) -> Tensor:
        """Mean over the steps that were read, ``(pictures,)``."""
        return torch.stack(self.pulls).mean(0)

    def decide(self, plan: Plan, call: Call, output: Tensor) -> Tensor:
        """The verdicts, and the output that the pipeline goes on with: its own but at flagged rows."""
        count = call.count
        for row, score in enumerate(self.scores.tolist()):
            if not score == score:
                raise InputError(f"the score of picture {row} is not finite; try float32")
            self.verdicts.append(Verdict(
                row, float(f"{score:.6g}"), *plan.threshold, prompt=_prompt(self.prompts, row, count),
                flagged=score >= plan.threshold.value, extra_calls=call.asked,
            ))  # fmt: skip
        for action in plan.actions:
            if rows := [verdict.row for verdict in self.verdicts if not verdict.is_safe]:
                output = ACTIONS[action](self, plan, call, output, rows)
        return output

    def remedied(self, call: Call, output: Tensor) -> Tensor:
        """The output of a later step."""
        for row, applied in self.applied.items():
            output = call.merged(output, [row], applied.output(call, row, output, self.index)[0])
        return output

    def note(self, row: int, **changed: Any) -> None:
        """Change a verdict."""
        self.verdicts[row] = replace(self.verdicts[row], **changed)

    def unit_noise(self, sample: Tensor) -> Tensor:
        """x_T of unit variance that belongs to a denoiser's first input."""
        scaled = self._scaled(torch.ones_like(sample[:1]) * self._init_sigma)
        return sample / scaled

    def start_at(self, row: int, noise: Tensor, call: Call) -> None:
        """Draw a picture from other ``noise (c, h, w)`` of unit variance."""
        self.moved[row] = noise * self._init_sigma
        call.move(row, self.input_of(noise))

    def input_of(self, noise: Tensor) -> Tensor:
        """What the denoiser is given at the first step of ``noise`` of unit variance."""
        return self._scaled(noise * self._init_sigma)

    @property
    def _init_sigma(self) -> Any:
        return getattr(self.scheduler, "init_noise_sigma", 1.0)

    def _scaled(self, sample: Tensor) -> Tensor:
        scale = getattr(self.scheduler, "scale_model_input", None)
        return scale(sample, self.scheduler.timesteps[self.index]) if scale else sample


def _prompt(prompts: Sequence[str], row: int, count: int) -> str | None:
    """The text of a picture, where every prompt has as many."""
    return prompts[row * len(prompts) // count] if prompts and count % len(prompts) == 0 else None


def _warn(generation: Generation, plan: Plan, call: Call, output: Tensor, rows: list[int]) -> Tensor:
    for row in rows:
        generation.note(row, action="warn", done=_joined(generation.verdicts[row], "drawn as it is"))
    return output


def _reseed(generation: Generation, plan: Plan, call: Call, output: Tensor, rows: list[int]) -> Tensor:
    """Other noise for the rows that are flagged; the one of lowest score stays, the pipeline's own among them."""
    scores = {row: generation.verdicts[row].score for row in rows}
    for attempt in range(1, plan.tries + 1):
        if not rows:
            break
        shape = (len(rows), *call.latents.shape[1:])
        noise = torch.randn(shape, generator=plan.generator).to(call.latents)
        other = call.of(rows, generation.input_of(noise))
        found = other.output()
        pulls = call.scale.pull(*other.pair(found)).tolist()
        for place, row in enumerate(list(rows)):
            generation.note(row, extra_calls=generation.verdicts[row].extra_calls + other.asked)
            if pulls[place] < scores[row]:
                scores[row] = pulls[place]
                output = call.merged(output, [row], found[other.places([place])])
                generation.start_at(row, noise[place], call)
                score = float(f"{pulls[place]:.6g}")
                generation.note(row, score_after=score, done=f"noise {attempt} of {plan.tries} scores {score:.4g}")
        rows = [row for row in rows if scores[row] >= plan.threshold.value]
    for row in scores:
        done = generation.verdicts[row].done or f"none of {plan.tries} other noises scores lower"
        generation.note(row, action="reseed", done=done)
    return output


def _mitigate(generation: Generation, plan: Plan, call: Call, output: Tensor, rows: list[int]) -> Tensor:
    assert plan.mitigation is not None
    steps, scale = len(generation.scheduler.timesteps), call.pipe.guidance_scale
    for row in rows:
        verdict, own = generation.verdicts[row], call.of([row])
        noise = generation.unit_noise(own.latents)
        embeds = call.family.condition(own.named)[0][-1:]
        applied = apply(plan.mitigation, call.pipe, noise, embeds, verdict.prompt, plan.levels, scale, steps)
        generation.applied[row] = applied
        if not torch.equal(applied.remedy.latents[0], noise.float()):
            generation.start_at(row, applied.remedy.latents[0, 0].to(noise), call)
        found, pair = applied.output(call, row, output, generation.index)
        output = call.merged(output, [row], found)
        score = call.scale.pull(*pair)[0].item() if applied.remedy.scorable else None
        generation.note(row, action="mitigate", done=_joined(verdict, f"mitigated by {plan.mitigation.name}"),
                        score_after=None if score is None else float(f"{score:.6g}"))  # fmt: skip
    return output


def _blank(generation: Generation, plan: Plan, call: Call, output: Tensor, rows: list[int]) -> Tensor:
    for row in rows:
        generation.blank.add(row)
        generation.note(row, action="blank", done=_joined(generation.verdicts[row], "left blank"))
    return output


def _refuse(generation: Generation, plan: Plan, call: Call, output: Tensor, rows: list[int]) -> Tensor:
    for row in rows:
        generation.note(row, action="refuse", done=_joined(generation.verdicts[row], "refused"))
    return output


def _joined(verdict: Verdict, done: str) -> str:
    return f"{verdict.done}, {done}" if verdict.done else done


Action = Callable[[Generation, Plan, Call, Tensor, list[int]], Tensor]
ACTIONS: Mapping[str, Action] = {
    "warn": _warn, "reseed": _reseed, "mitigate": _mitigate, "blank": _blank, "refuse": _refuse
}  # fmt: skip
