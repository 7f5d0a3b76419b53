"""The report of a run of mitigation."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from memorization.io.files import read_lines
from memorization.report.common import made_by
from memorization.report.page import Page, Shown, Table

LINES = "mitigations.jsonl"
EVIDENCE = (
    "A mitigation that holds for these noises may not hold for others, nor against somebody who wants the copy back.",
    "Where a training picture is not known, the nearest known one stands for it.",
)
MOST = 24  # pairs in a page


def fits(folder: Path, record: dict) -> bool:
    """Whether the folder holds a run of mitigation."""
    return (folder / LINES).is_file()


def page(folder: Path, record: dict, shown: Shown) -> Page:
    """The report of the run in ``folder``."""
    rows, _ = read_lines(folder / LINES)
    measures = [key.removesuffix("_after") for key in rows[0] if key.endswith("_after")] if rows else []
    settings = record["settings"]
    model = shown.text(settings["model"])
    said = [f"{len(rows)} prompts of {model} were mitigated by {settings['method']}."]
    said += [f"{name}: {mean_of(rows, name, 'before'):.3f} before, {mean_of(rows, name, 'after'):.3f} after (means)."
             for name in measures]  # fmt: skip
    pairs = [
        shown.pair([(folder / "images" / f"{row['id']:04d}-{when}-0.png", f"{when} the mitigation")
                    for when in ("before", "after")], f"“{row['prompt']}” before and after, from the same noise")
        for row in rows[:MOST]
    ]  # fmt: skip
    columns = ["prompt", "new prompt", *(f"{name}, {when}" for name in measures for when in ("before", "after"))]
    table = Table("Prompts", columns, [
        [shown.text(row["prompt"]), shown.text(row["new_prompt"]),
         *(f"{np.mean(row[f'{name}_{when}']):.4g}" if f"{name}_{when}" in row else ""
           for name in measures for when in ("before", "after"))] for row in rows
    ])  # fmt: skip
    return Page(
        f"Mitigation on {model}", said, [("Method", settings["method"]), *made_by(record, shown)], EVIDENCE,
        pairs=[pair for pair in pairs if pair is not None], pairs_title="Before and after", tables=[table],
    )  # fmt: skip


def mean_of(rows: list[dict], name: str, when: str) -> float:
    """Mean of a measure over the prompts that have it."""
    return float(np.mean([np.mean(row[f"{name}_{when}"]) for row in rows if f"{name}_{when}" in row]))
