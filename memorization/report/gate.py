"""May this be shipped? Decided on the upper end of an exact interval of a run's share of copies.

The limit of a copy lets a share of the base's own pictures count as copies (``--fpr`` of an audit), so that a fine-tune
which copies nothing has that share too. What decides for an audit is therefore how far the fine-tune's share lies above
the base's, on pictures of the same prompts and noise; and whether the audit calls any training picture copied.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from memorization.errors import InputError
from memorization.evaluation.intervals import upper_end, upper_end_of_difference
from memorization.evaluation.metrics import noise_mean
from memorization.io.families import near_copy_families
from memorization.io.files import read_json, read_lines
from memorization.report.common import complete_record, deciding, is_audit

TRIALS = range(1, 10_000_000)  # of which a gate speaks


class Count(NamedTuple):
    """``hits`` of ``trials`` are ``counted``.

    Attributes:
        lost: None of a detection run. Of an audit, whose ``hits`` are copies where the base's picture of the same
            prompt and noise is none: those the other way round.
        copied: training pictures that an audit calls copied; none may be.
        known: training pictures that the base draws itself, which have limits of their own.
        uncounted: of an audit, kinds of prompts that are not counted: (copies, pictures, copies of the base).
    """

    counted: str
    hits: int
    trials: int
    lost: int | None = None
    copied: Sequence[str] = ()
    known: Sequence[str] = ()
    uncounted: Mapping[str, tuple[int, int, int]] = {}

    def upper(self, confidence: float, trials: int) -> float:
        """The one-sided upper end of the share of hits (Clopper and Pearson), if as many ``trials`` have these shares.

        Of an audit it is that of the share of hits less that of lost ones, which is how far the fine-tune's share of
        copies lies above the base's.
        """
        hits = self.hits * trials / self.trials
        if self.lost is None:
            return upper_end(hits, trials, confidence)
        return upper_end_of_difference(hits, self.lost * trials / self.trials, trials, confidence)


@dataclass(frozen=True)
class Decision:
    """What a gate says.

    Attributes:
        upper: see :meth:`Count.upper`.
        needed: how many trials would pass at the same shares; None where no number of them would.

    The others are those of :class:`Count`.
    """

    passed: bool
    counted: str
    hits: int
    trials: int
    lost: int | None
    copied: Sequence[str]
    known: Sequence[str]
    uncounted: Mapping[str, tuple[int, int, int]]
    upper: float
    needed: int | None
    max_copies: float
    confidence: float

    def __str__(self) -> str:
        sign = "not above" if self.upper <= self.max_copies else "above"
        lost, share = "", "the share"
        if self.lost is not None:
            lost, share = f", {self.lost} the other way round", "the share of copies less the base's"
        return (f"{'pass' if self.passed else 'stop'}: {self.hits} of {self.trials} {self.counted}{lost}"
                f"{self._beside()}; with {self.confidence:.0%} confidence {share} is at most {self.upper:.4f}, {sign} "
                f"the {self.max_copies:g} that is allowed{self._advice()}")  # fmt: skip

    def _beside(self) -> str:
        said = []
        if self.copied:
            said += [f"training pictures that count as copied: {len(self.copied)}, and none may"]
        if self.known:
            said += [f"training pictures with limits of their own, as the base draws them itself: {len(self.known)}"]
        said += [
            f"not counted: {copies} of {pictures} pictures of {kind} prompts are copies ({base} of the base's)"
            for kind, (copies, pictures, base) in self.uncounted.items() if copies
        ]  # fmt: skip
        return "".join(f"; {one}" for one in said)

    def _advice(self) -> str:
        if self.passed:
            return ""
        return f"; {self.needed} would suffice at these shares" if self.needed else "; more of them would not help"


def decide(folder: Path, max_copies: float, confidence: float, epoch: str | None = None) -> Decision:
    """Decide on an audit or a detection run.

    Args:
        max_copies: the largest share that is allowed, above 0 and below 1.
        epoch: of an audit; None for its last.

    Raises:
        InputError: the folder holds neither, or one that is not complete, or the epoch is not among its.
    """
    record = complete_record(folder)
    if is_audit(record):
        count = copies_of_epoch(folder, epoch)
    elif "detectors" in record["settings"] and epoch is None:
        count = flagged_families(folder, record)
    else:
        raise InputError(f"{folder}: no audit{' with epochs' * bool(epoch)} and no detection run to decide on")
    upper = count.upper(confidence, count.trials)
    place = bisect_left(TRIALS, True, key=lambda trials: count.upper(confidence, trials) <= max_copies)
    needed = TRIALS[place] if place < len(TRIALS) and not count.copied else None
    passed = upper <= max_copies and not count.copied
    return Decision(passed, *count, upper=upper, needed=needed, max_copies=max_copies, confidence=confidence)


def copies_of_epoch(folder: Path, epoch: str | None) -> Count:
    """Copies among pictures generated from an epoch's training captions, against the base's.

    All captions are asked, and every try has noise of its own, so that an interval of the noises is exact.

    Raises:
        InputError: there is no such epoch, or ``audit.json`` is damaged or of another version.
    """
    found = read_json(folder / "audit.json")
    try:
        counts = counts_of(found)
        chosen = epoch or list(counts)[-1]
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{folder}: damaged, or of another version ({type(error).__name__}: {error})") from None
    if chosen not in counts:
        raise InputError(f"{folder}: no epoch {chosen}; there are: {', '.join(counts)}")
    return counts[chosen]


def counts_of(found: Mapping) -> dict[str, Count]:
    """Of every epoch, from what an audit found (``audit.json``)."""
    base, *tuned = found["epochs"]
    return {
        one["name"]: Count(
            f"pictures of epoch {one['name']} are copies where the base's are none",
            one["gained"], one["copies"]["caption"]["pictures"], one["lost"],
            [each["training"] for each in found["pictures"] if each["epochs"][one["name"]]["verdict"] == "copied"],
            [name for known in found["known"] for name in known["training"]],
            {kind: (share["copies"], share["pictures"], base["copies"][kind]["copies"])
             for kind, share in one["copies"].items() if kind not in ("all", "caption")},
        )
        for one in tuned
    }  # fmt: skip


def flagged_families(folder: Path, record: dict) -> Count:
    """Families of near-copies with a flagged prompt.

    Near-copies of a prompt say the same thing over again: a family counts once, and if any of its prompts is flagged.
    """
    names, threshold = deciding(record)
    if threshold is None:
        raise InputError(f"{folder}: scored without a threshold, so nothing is flagged; score again with --calibration")
    rows, _ = read_lines(folder / "scores.jsonl")
    families = families_of(rows)
    flagged = {family for family, row in zip(families, rows, strict=True) if noise_mean(row[names[0]]) >= threshold}
    what = f"families of prompts are flagged ({names[0]} >= {threshold:.4g})"
    return Count(what, len(flagged), len(set(families)))


def families_of(rows: Sequence[dict]) -> list:
    """The family of every line: its list's, or that of its prompt's near-copies."""
    if all("family" in row for row in rows):
        return [row["family"] for row in rows]
    return list(near_copy_families([row["prompt"] for row in rows]))
