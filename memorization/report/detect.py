"""The report of a detection run."""

from __future__ import annotations

from pathlib import Path

from memorization.evaluation.metrics import noise_mean
from memorization.io.files import read_lines
from memorization.report.common import as_text, deciding, made_by
from memorization.report.page import Page, Shown, Table

EVIDENCE = (
    "A score says that a prompt behaves like memorized ones; it names no training picture.",
    "A threshold holds for the model, the settings and the kind of prompts that it was calibrated on.",
    "Prompts that were not scored may be memorized too.",
)


def fits(folder: Path, record: dict) -> bool:
    """Whether the folder holds a run of detection."""
    return "detectors" in record["settings"]


def page(folder: Path, record: dict, shown: Shown) -> Page:
    """The report of the run in ``folder``, its prompts from the highest score down."""
    rows, _ = read_lines(folder / "scores.jsonl")
    names, threshold = deciding(record)
    first = names[0] if names else None
    ranked = sorted(rows, key=lambda row: -noise_mean(row[first])) if first else rows
    flagged = [first and threshold is not None and noise_mean(row[first]) >= threshold for row in ranked]
    model = shown.text(record["settings"]["model"])
    said = [f"{len(rows)} prompts were scored on {model}."]
    if threshold is not None:
        said.append(f"{sum(map(bool, flagged))} of them are flagged as memorized: their {first} is {threshold:.4g} or "
                    "more.")  # fmt: skip
    else:
        said.append("The run has no calibrated threshold: the scores rank the prompts, and flag none.")
    table = Table(
        "Prompts", ["prompt", *(["flagged"] if threshold is not None else []), *names],
        [[shown.text(row.get("image", row["prompt"])), *([("yes" if flag else "no")] if threshold is not None else []),
          *(f"{noise_mean(row[name]):.4g}" for name in names)] for row, flag in zip(ranked, flagged, strict=True)],
    )  # fmt: skip
    limit = [] if threshold is None else [(f"Limit: {first} of at least", f"{threshold:.4g}: from the calibration")]
    method = [*limit, ("Detectors", as_text(record["settings"]["detectors"])),
              ("Prompts", as_text(record["settings"].get("prompts"))), *made_by(record, shown)]  # fmt: skip
    return Page(f"Detection on {model}", said, method, EVIDENCE, tables=[table])
