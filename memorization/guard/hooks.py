"""The guard itself: hooks on a pipeline's denoiser, its scheduler's step and its pictures; nothing else is touched.

The pipeline's own ``__call__`` runs. The guard reads the score from what the denoiser says at the first step anyway,
hands the pipeline another output where a picture is flagged, and gives the scheduler's step other latents where it is
drawn from other noise. Where nothing is flagged it changes nothing, to the bit.
"""

from __future__ import annotations

import functools
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from memorization.errors import InputError
from memorization.guard.call import Call
from memorization.guard.generation import ACTIONS, Generation, Plan
from memorization.guard.pictures import Comparison, Pictures, as_bytes, blanked, is_pictures
from memorization.guard.remedies import check_mitigation
from memorization.guard.thresholds import Conditions, Threshold, Thresholds, check, fixed_conditions, read_thresholds
from memorization.guard.verdict import GuardWarning, Refused, Verdict
from memorization.index.store import Index
from memorization.mitigations.base import Mitigation, make_mitigation
from memorization.models.families.base import family_of
from memorization.settings import Count, value_of

MITIGATION = "noise_norm"  # where no other is asked for


class Watch(ABC):
    """Hooks on a pipeline, from when it is made until :meth:`release`.

    Args:
        steps: of a generation whose scores are read; :meth:`_decide` is called with the last.

    Attributes:
        generation: the one under way, or the last.

    Raises:
        InputError: the pipeline is of no known family, is watched already, or caches its denoiser's outputs.
    """

    def __init__(self, pipe: Any, steps: int) -> None:
        self.pipe, self.steps = pipe, steps
        self.family, self.scheduler = family_of(pipe), pipe.scheduler
        if not self.family.watchable:
            raise InputError(f"{type(pipe).__name__}: the guard cannot watch the family {self.family.name} yet")
        self.denoiser = self.family.denoiser(pipe)
        self.generation: Generation | None = None
        self._busy, self._prompts = False, ()
        if "step" in vars(self.scheduler):
            raise InputError("the pipeline is protected already: release it first")
        if getattr(self.denoiser, "is_cache_enabled", False):
            raise InputError("a cache is enabled on the denoiser: what it returns is then no prediction; disable it")
        self._undo = ExitStack()
        # A compiled denoiser calls its hooks as they are: what they do is nothing to compile.
        hook = torch.compiler.disable(self._predicted)
        self._undo.callback(self.denoiser.register_forward_hook(hook, with_kwargs=True).remove)
        self._wrap(self.scheduler, "set_timesteps", self._begin)
        self._wrap(self.scheduler, "step", self._step)
        self._wrap(pipe, "encode_prompt", self._encode)
        self._wrap(pipe.image_processor, "postprocess", self._finish)

    def _wrap(self, owner: Any, name: str, method: Callable[..., Any]) -> None:
        """Call ``method(original, ...)`` instead, until released; signatures stay, since pipelines look at them."""
        original = getattr(owner, name)

        @functools.wraps(original)
        def wrapped(*args, **kwargs):
            return method(original, *args, **kwargs)

        object.__setattr__(owner, name, wrapped)  # a pipeline's own would take it for one of its parts
        self._undo.callback(lambda: object.__delattr__(owner, name))

    def release(self) -> None:
        """Take the hooks off; the pipeline is as it was."""
        self._undo.close()

    @contextmanager
    def _quietly(self):
        """While the guard asks the pipeline's parts itself."""
        self._busy = True
        try:
            yield
        finally:
            self._busy = False

    def _check(self) -> None:
        """See that what is hooked is what the pipeline draws with.

        Raises:
            InputError: it is not, and nothing would be seen.
        """
        if self.pipe.scheduler is not self.scheduler or self.family.denoiser(self.pipe) is not self.denoiser:
            raise InputError("the pipeline's scheduler or denoiser was replaced: release the guard, protect it anew")

    def _encode(self, original: Callable, *args, **kwargs) -> Any:
        if not self._busy:
            self._check()
            prompt = args[0] if args else kwargs.get("prompt")
            self._prompts = [prompt] if isinstance(prompt, str) else list(prompt or ())
        return original(*args, **kwargs)

    def _begin(self, original: Callable, *args, **kwargs) -> Any:
        if not self._busy:
            self.generation = Generation(self.scheduler, self._prompts)
            self._prompts = ()
        made = original(*args, **kwargs)
        if not self._busy and len(self.scheduler.timesteps) < self.steps:
            raise InputError(
                f"the guard reads {self.steps} steps, and the generation has {len(self.scheduler.timesteps)}"
            )
        return made

    def _predicted(self, module: Any, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        generation = self.generation
        if self._busy or generation is None or generation.is_over or not generation.awaited:
            return None
        generation.awaited = False  # a second call in one step, as of skip-layer guidance, is not the prediction
        first = output[0]
        with self._quietly():
            named = self.family.named(args, kwargs)
            scale = self.family.scale(self.pipe, generation.timestep)
            call = Call(self.pipe, self.family, module, named, scale, self.family.is_guided(self.pipe))
            changed = self._changed(generation, call, first)
        if changed is first:
            return None
        return (changed, *output[1:]) if isinstance(output, tuple) else type(output)(sample=changed)

    def _changed(self, generation: Generation, call: Call, output: Tensor) -> Tensor:
        """The output of a step that the pipeline goes on with."""
        if generation.index < self.steps:
            generation.read(call, output)
        if generation.index == self.steps - 1:
            return self._decide(generation, call, output)
        return generation.remedied(call, output) if generation.applied else output

    @abstractmethod
    def _decide(self, generation: Generation, call: Call, output: Tensor) -> Tensor:
        """What is done once the score is read."""

    def conditions(self, generation: Generation, call: Call) -> dict[str, Any]:
        """What of :class:`~memorization.guard.thresholds.Conditions` a generation says."""
        return {
            "guidance_scale": float(self.pipe.guidance_scale),
            "timesteps": tuple(generation.timesteps),
            "size": tuple(call.latents.shape[1:]),
        }

    def _step(self, original: Callable, output: Tensor, timestep: Any, sample: Tensor, *args, **kwargs) -> Any:
        generation = self.generation
        if self._busy or generation is None or generation.is_over:
            return original(output, timestep, sample, *args, **kwargs)
        if generation.moved:
            sample = sample.clone()
            for row, latents in generation.moved.items():
                sample[row] = latents
            generation.moved = {}
        made = original(output, timestep, sample, *args, **kwargs)
        if generation.blank:  # nothing of them is left, for callbacks and latents too
            made[0][list(generation.blank)] = 0
        generation.index, generation.awaited = generation.index + 1, True
        return made

    def _finish(self, original: Callable, *args, **kwargs) -> Any:
        return original(*args, **kwargs)


class Guard(Watch):
    """A protected pipeline, until :meth:`release`; also a context manager. :func:`protect` makes it.

    Attributes:
        verdicts: of the last generation, one a picture.
    """

    def __init__(
        self,
        pipe: Any,
        plan: Plan,
        comparison: Comparison | None,
        on_copy: str,
        holds_for: Conditions | None,
        where: str,
    ) -> None:
        super().__init__(pipe, plan.steps)
        self.plan, self.comparison, self.on_copy, self.holds_for, self.where = (
            plan,
            comparison,
            on_copy,
            holds_for,
            where,
        )

    @property
    def verdicts(self) -> list[Verdict]:
        return list(self.generation.verdicts) if self.generation else []

    def __enter__(self) -> Guard:
        return self

    def __exit__(self, kind, error, trace) -> None:
        self.release()

    def _decide(self, generation: Generation, call: Call, output: Tensor) -> Tensor:
        if self.holds_for:
            check(self.holds_for, self.conditions(generation, call), self.where)
        output = generation.decide(self.plan, call, output)
        self._speak(generation, [verdict for verdict in generation.verdicts if verdict.action in ("warn", "refuse")])
        return output

    def _speak(self, generation: Generation, verdicts: Sequence[Verdict]) -> None:
        """Warn of pictures, or refuse all of the batch."""
        if refused := [verdict for verdict in verdicts if verdict.action == "refuse"]:
            generation.index = len(self.scheduler.timesteps)  # nothing more is drawn of it
            raise Refused(refused)
        for verdict in verdicts:
            warnings.warn(str(verdict), GuardWarning, stacklevel=2)

    def _finish(self, original: Callable, *args, **kwargs) -> Any:
        """Compare the pictures, and blank those that are to be."""
        made = original(*args, **kwargs)
        generation = self.generation
        if self._busy or generation is None or not generation.verdicts or not is_pictures(made):
            return made
        if self.comparison:
            self._compare(generation, made)
        reasons = {row: str(generation.verdicts[row]) for row in generation.blank}
        return blanked(made, reasons) if reasons else made

    def _compare(self, generation: Generation, made: Pictures) -> None:
        assert self.comparison is not None
        found = self.comparison(as_bytes(made))
        for verdict, near in zip(list(generation.verdicts), found, strict=True):
            if verdict.row in generation.blank:
                continue
            generation.note(verdict.row, near=near)
            if near.is_copy:
                generation.note(verdict.row, action=self.on_copy, done=f"{verdict.done}, {COPIED}".removeprefix(", "))
                if self.on_copy == "blank":
                    generation.blank.add(verdict.row)
        copied = [verdict for verdict in generation.verdicts if verdict.near and verdict.near.is_copy]
        self._speak(generation, [verdict for verdict in copied if verdict.action in ("warn", "refuse")])


COPIED = "found to be a copy when it was drawn"
ON_COPY = ("warn", "blank", "refuse")


def protect(
    pipe: Any,
    threshold: float | str | Path | Thresholds,
    *,
    action: str | Sequence[str] = "warn",
    fpr: float | None = None,
    steps: int = 1,
    tries: int = 4,
    generator: torch.Generator | None = None,
    mitigation: str = MITIGATION,
    settings: Mapping[str, object] | None = None,
    index: str | Path | Index | None = None,
    limit: float | None = None,
    on_copy: str = "warn",
) -> Guard:
    """Guard a diffusers pipeline of yours: detect at the first step, and act. See docs/guard.md.

    Score: the pull of the prompt, D = || x0_c - x0_u || / sqrt(d) (:meth:`.Scale.pull`), from the predictions that the
    pipeline makes anyway. Without guidance, or with a negative prompt, one denoiser call more.

    Args:
        threshold: a score, or what ``memorization calibrate`` wrote, which is refused for anything else than it was
            made for (weights, dtype, scheduler, guidance, first timesteps, size).
        action: for flagged pictures, or several in turn for those that are still flagged: ``warn``; ``reseed``, other
            noise; ``mitigate``; ``blank``, a blank picture with the reason; ``refuse``, :class:`.Refused`.
        fpr: share of ordinary pictures that may be flagged, in place of the file's own.
        steps: whose scores are averaged; more than one goes with ``warn``, ``blank`` and ``refuse`` alone.
        tries: noises of ``reseed``; the lowest score stays.
        generator: of that noise, on the CPU; default: one of seed 51.
        mitigation, settings: of ``mitigate``, by the names of docs/mitigations.md; Stable Diffusion 1 and 2 alone.
        index: of training pictures that every picture is compared with; ``limit`` is where a copy begins (default: the
            field's), ``on_copy`` what is done then: ``warn``, ``blank`` or ``refuse``.

    Returns:
        The guard, whose ``verdicts`` are those of the last generation, a picture each. It guards until it is
        ``release()``d, or until the end of a ``with`` block.

    Raises:
        InputError: an argument makes no sense, the pipeline is of no known family, or the thresholds hold for another.
    """
    actions = [action] if isinstance(action, str) else list(action)
    _check_arguments(actions, steps, on_copy, limit, index)
    known = read_thresholds(Path(threshold)) if isinstance(threshold, (str, Path)) else threshold
    where = str(threshold) if isinstance(threshold, (str, Path)) else "the thresholds"
    plan = Plan(
        _threshold_of(known, fpr), actions, value_of(Count, steps, "steps"), value_of(Count, tries, "tries"),
        generator or torch.Generator().manual_seed(51),
    )  # fmt: skip
    family, conditions = family_of(pipe), None
    if isinstance(known, Thresholds):
        conditions = known.conditions
        check(conditions, fixed_conditions(pipe, family), where)
        if len(conditions.timesteps) != steps:
            raise InputError(f"{where} is for {len(conditions.timesteps)} steps, not {steps}")
    if "mitigate" in actions:
        if not family.mitigable:
            raise InputError(f"mitigate: the mitigations know no {family.name} yet; take another action")
        plan = _mitigating(plan, make_mitigation(mitigation, settings), pipe, known)
    store = index if isinstance(index, Index) or index is None else Index(Path(index))
    return Guard(pipe, plan, Comparison(store, limit) if store else None, on_copy, conditions, where)


def _check_arguments(actions: list[str], steps: int, on_copy: str, limit: float | None, index: object) -> None:
    if unknown := [action for action in actions if action not in ACTIONS] or ([] if actions else ["none"]):
        raise InputError(f"action = {unknown[0]} is not one of {', '.join(ACTIONS)}")
    if steps != 1 and {"reseed", "mitigate"} & set(actions):
        raise InputError("reseed and mitigate act at the first step: steps = 1")
    if on_copy not in ON_COPY:
        raise InputError(f"on_copy = {on_copy} is not one of {', '.join(ON_COPY)}")
    if limit is not None and index is None:
        raise InputError("limit: says where a copy begins, and needs an index")


def _threshold_of(known: float | Thresholds, fpr: float | None) -> Threshold:
    if isinstance(known, Thresholds):
        return known.at(known.fpr if fpr is None else fpr)
    if fpr is not None:
        raise InputError("fpr: goes with a file of thresholds, not with a number")
    return Threshold(value_of(float, known, "threshold"), "given by the caller")


def _mitigating(plan: Plan, method: Mitigation, pipe: Any, known: float | Thresholds) -> Plan:
    """The plan with a mitigation, and the levels that its file of thresholds says."""
    levels = _norm_levels(pipe, known) if isinstance(known, Thresholds) else {}
    check_mitigation(method, levels)
    return replace(plan, mitigation=method, levels=levels)


def _norm_levels(pipe: Any, known: Thresholds) -> dict[str, dict[float, float]]:
    """Levels of the norm at the first step, for mitigations that lower it; the pull is the norm times a constant."""
    conditions = known.conditions
    scale = family_of(pipe).scale(pipe, conditions.timesteps[0])
    numbers = int(torch.Size(conditions.size).numel())
    return {"noise_norm": {share: scale.norm_of(level, numbers) for share, level in known.levels.items()}}
