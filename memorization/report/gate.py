"""May this be shipped? Decided on the upper end of an exact interval of a run's share of copies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from memorization.errors import InputError
from memorization.evaluation.intervals import upper_end
from memorization.evaluation.metrics import noise_mean
from memorization.evaluation.runs import read_run_record
from memorization.io.families import near_copy_families
from memorization.io.files import read_json, read_lines
from memorization.report.common import deciding


@dataclass(frozen=True)
class Decision:
    """What a gate says.

    Attributes:
        counted: what ``hits`` of ``trials`` are.
        upper: the one-sided upper end of their share, by Clopper and Pearson.
    """

    passed: bool
    counted: str
    hits: int
    trials: int
    upper: float
    max_copies: float
    confidence: float

    def __str__(self) -> str:
        sign = "at most" if self.passed else "above"
        return (f"{'pass' if self.passed else 'stop'}: {self.hits} of {self.trials} {self.counted}; with "
                f"{self.confidence:.0%} confidence the share is at most {self.upper:.4f}, {sign} the "
                f"{self.max_copies:g} that is allowed{self._advice()}")  # fmt: skip

    def _advice(self) -> str:
        if self.passed or self.hits:
            return ""
        needed = int(np.ceil(np.log(1 - self.confidence) / np.log1p(-self.max_copies)))
        return f"; {needed} without a copy would suffice"


def decide(folder: Path, max_copies: float, confidence: float, epoch: str | None = None) -> Decision:
    """Decide on an audit or a detection run.

    Args:
        max_copies: the largest share that is allowed, above 0 and below 1.
        epoch: of an audit; None for its last.

    Raises:
        InputError: the folder holds neither, or one that is not complete, or the epoch is not among its.
    """
    record = read_run_record(folder)
    if record["status"] != "complete":
        raise InputError(f"{folder}: this run is not complete; the command that made it goes on with it")
    if (folder / "audit.json").exists():
        counted, hits, trials = copies_of_epoch(folder, epoch)
    elif "detectors" in record["settings"] and epoch is None:
        counted, hits, trials = flagged_families(folder, record)
    else:
        raise InputError(f"{folder}: no audit{' with epochs' * bool(epoch)} and no detection run to decide on")
    upper = upper_end(hits, trials, confidence)
    return Decision(upper <= max_copies, counted, hits, trials, upper, max_copies, confidence)


def copies_of_epoch(folder: Path, epoch: str | None) -> tuple[str, int, int]:
    """What is counted, copies, and pictures generated from an epoch's training captions.

    All captions are asked, and every try has noise of its own, so that an interval of the noises is exact.
    """
    epochs = read_json(folder / "audit.json").get("epochs", [])[1:]  # the first is the base
    names = [one["name"] for one in epochs]
    if not epochs or (epoch is not None and epoch not in names):
        raise InputError(f"{folder}: no epoch {epoch or ''}; there are: {', '.join(names) or 'none'}")
    chosen = epochs[-1] if epoch is None else epochs[names.index(epoch)]
    share = chosen["copies"]["caption"]
    return f"pictures of epoch {chosen['name']} are copies", share["copies"], share["pictures"]


def flagged_families(folder: Path, record: dict) -> tuple[str, int, int]:
    """What is counted, families of near-copies with a flagged prompt, and families.

    Near-copies of a prompt say the same thing over again: a family counts once, and if any of its prompts is flagged.
    """
    names, threshold = deciding(record)
    if threshold is None:
        raise InputError(f"{folder}: scored without a threshold, so nothing is flagged; score again with --calibration")
    rows, _ = read_lines(folder / "scores.jsonl")
    families = families_of(rows)
    flagged = {family for family, row in zip(families, rows, strict=True) if noise_mean(row[names[0]]) >= threshold}
    return f"families of prompts are flagged ({names[0]} >= {threshold:.4g})", len(flagged), len(set(families))


def families_of(rows: Sequence[dict]) -> list:
    """The family of every line: its list's, or that of its prompt's near-copies."""
    if all("family" in row for row in rows):
        return [row["family"] for row in rows]
    return list(near_copy_families([row["prompt"] for row in rows]))
