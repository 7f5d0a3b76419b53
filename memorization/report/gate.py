"""May this be shipped? Decided on the upper end of an exact interval of a run's share of copies.

The limit of a copy lets a share of the base's own pictures count as copies (``--fpr`` of an audit), so that a fine-tune
which copies nothing has that share too. What decides for an audit is therefore how far the fine-tune's share lies above
the base's, on pictures of the same prompts and noise.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from memorization.errors import InputError
from memorization.evaluation.intervals import lower_end, upper_end
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
    """

    counted: str
    hits: int
    trials: int
    lost: int | None = None

    def upper(self, confidence: float, trials: int) -> float:
        """The one-sided upper end of the share of hits (Clopper and Pearson), if as many ``trials`` have these shares.

        Of an audit it is that of the share of hits less that of lost ones, which is how far the fine-tune's share of
        copies lies above the base's: a bound for each, that fails with half of the probability.
        """
        hits = self.hits * trials / self.trials
        if self.lost is None:
            return upper_end(hits, trials, confidence)
        each = (1 + confidence) / 2
        return upper_end(hits, trials, each) - lower_end(self.lost * trials / self.trials, trials, each)


@dataclass(frozen=True)
class Decision:
    """What a gate says.

    Attributes:
        upper: see :meth:`Count.upper`.
        needed: how many trials would pass at the same shares; None where no number of them would.
    """

    passed: bool
    counted: str
    hits: int
    trials: int
    lost: int | None
    upper: float
    needed: int | None
    max_copies: float
    confidence: float

    def __str__(self) -> str:
        sign = "not above" if self.passed else "above"
        lost, share = "", "the share"
        if self.lost is not None:
            lost, share = f", {self.lost} the other way round", "the share of copies less the base's"
        return (f"{'pass' if self.passed else 'stop'}: {self.hits} of {self.trials} {self.counted}{lost}; with "
                f"{self.confidence:.0%} confidence {share} is at most {self.upper:.4f}, {sign} the {self.max_copies:g} "
                f"that is allowed{self._advice()}")  # fmt: skip

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
    needed = bisect_left(TRIALS, True, key=lambda trials: count.upper(confidence, trials) <= max_copies)
    return Decision(
        upper <= max_copies, *count, upper=upper, needed=TRIALS[needed] if needed < len(TRIALS) else None,
        max_copies=max_copies, confidence=confidence,
    )  # fmt: skip


def copies_of_epoch(folder: Path, epoch: str | None) -> Count:
    """Copies among pictures generated from an epoch's training captions, against the base's.

    All captions are asked, and every try has noise of its own, so that an interval of the noises is exact.

    Raises:
        InputError: there is no such epoch, or ``audit.json`` is damaged or of another version.
    """
    found = read_json(folder / "audit.json")
    try:
        tuned = found["epochs"][1:]  # the first is the base
        epochs = {one["name"]: (one["gained"], one["copies"]["caption"]["pictures"], one["lost"]) for one in tuned}
        chosen = epoch or list(epochs)[-1]
    except (KeyError, TypeError, IndexError) as error:
        raise InputError(f"{folder}: damaged, or of another version ({type(error).__name__}: {error})") from None
    if chosen not in epochs:
        raise InputError(f"{folder}: no epoch {chosen}; there are: {', '.join(epochs)}")
    return Count(f"pictures of epoch {chosen} are copies where the base's are none", *epochs[chosen])


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
