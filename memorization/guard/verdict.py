"""What the guard says of a picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from memorization.errors import printable


@dataclass(frozen=True)
class Near:
    """The training picture of an index that is nearest to a picture.

    Attributes:
        measure: ``nl2``, ``l2`` (lower is nearer), or ``sscd``, ``clip`` (cosines, higher is nearer).
        limit: where a copy begins.
        path: of the training picture, as the index names it.
    """

    measure: str
    value: float
    limit: float
    path: str
    is_copy: bool


@dataclass(frozen=True)
class Verdict:
    """What the guard found of one picture, and what it did.

    Attributes:
        row: place of the picture in the pipeline's batch.
        prompt: where the pipeline was given text.
        score: the pull (:meth:`~memorization.models.families.base.Scale.pull`) at the user's own noise and prompt.
        threshold: score from which on a picture is flagged.
        source: where the threshold comes from.
        flagged: whether the score reached it.
        action: the last action that was taken: ``none``, ``warn``, ``reseed``, ``mitigate``, ``blank`` or ``refuse``.
        done: what was done, in words.
        score_after: the score of what is drawn instead; None where nothing else is.
        extra_calls: of the denoiser, beside those of the pipeline, at the step of the decision; those of a batch count
            for each of its pictures.
        near: the nearest training picture, where an index is compared with.
    """

    row: int
    score: float
    threshold: float
    source: str
    prompt: str | None = None
    flagged: bool = False
    action: str = "none"
    done: str = ""
    score_after: float | None = None
    extra_calls: int = 0
    near: Near | None = None

    @property
    def is_safe(self) -> bool:
        """Whether nothing speaks against the picture that is handed out."""
        if self.action in ("blank", "refuse"):
            return True
        score = self.score if self.score_after is None else self.score_after
        guided_away = self.action == "mitigate" and self.score_after is None
        return (score < self.threshold or guided_away) and not (self.near and self.near.is_copy)

    def __str__(self) -> str:
        side = ">=" if self.flagged else "<"
        said = f"picture {self.row}: score {self.score:.4g} {side} {self.threshold:.4g} ({self.source})"
        said += f"; {self.done}" if self.done else ""
        if self.near:
            copy = "a copy" if self.near.is_copy else "no copy"
            said += (
                f"; {self.near.measure} {self.near.value:.3g} to {self.near.path}: {copy} (limit {self.near.limit:g})"
            )
        return printable(said)


class GuardWarning(UserWarning):
    """A picture is flagged, and is drawn all the same."""


class Refused(Exception):
    """The guard refused to draw; ``verdicts`` says which pictures and why."""

    def __init__(self, verdicts: Sequence[Verdict]) -> None:
        super().__init__("; ".join(map(str, verdicts)))
        self.verdicts = list(verdicts)
