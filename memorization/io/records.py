"""The JSON files of a run, read back: what is damaged is said by file and field."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from memorization.io.files import read_json
from memorization.settings import Checked, Count, NotNegative, Place, make, value_of

RECORD = {
    "status": Literal["running", "stopped", "complete"], "seconds": float, "settings": dict[str, Any],
    "sessions": tuple[dict, ...], "lines": Place, "batch_size_used": Count, "rows": dict[str, dict],
    "copy_limits": dict[str, float],
}  # fmt: skip
NEEDED = ("status", "seconds", "settings")  # the others are there where they mean something


@dataclass(frozen=True)
class Cost(Checked):
    """What a detector costs a prompt with one noise: UNet evaluations, and seconds."""

    needs: str
    evaluations: NotNegative
    seconds: NotNegative


def read_record(path: Path) -> dict[str, Any]:
    """A run's ``run.json``.

    Raises:
        InputError: it cannot be read, or a field is not what it should be.
    """
    record = read_json(path)
    for name, kind in RECORD.items():
        if name in record or name in NEEDED:
            value_of(kind, record.get(name), f"{path}: damaged: {name}")
    return record


def read_costs(path: Path) -> dict[str, dict]:
    """A run's ``costs.json``, by detector.

    Raises:
        InputError: it cannot be read, or a field is not what it should be.
    """
    costs = read_json(path)
    for name, cost in costs.items():
        make(Cost, cost, f"{path}: {name}")
    return costs
