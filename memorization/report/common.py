"""What the reports of all kinds of runs share."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from memorization.errors import InputError
from memorization.evaluation.runs import read_run_record, score_names
from memorization.io.files import is_file, read_lines
from memorization.report.page import Shown

LINES = ("scores.jsonl", "mitigations.jsonl")  # of the kinds of runs; each has one of them


def complete_record(folder: Path) -> dict:
    """The ``run.json`` of a run that is complete.

    Raises:
        InputError: the folder holds no run, or one that was stopped, killed or begun anew, or is being made.
    """
    record = read_run_record(folder)
    counts = [len(read_lines(folder / name)[0]) for name in LINES if is_file(folder / name)]
    whole = [record.get("lines", count) for count in counts] == counts
    if record["status"] != "complete" or not whole or (is_audit(record) and not is_file(folder / "audit.json")):
        raise InputError(f"{folder}: this run is not complete; the command that made it goes on with it")
    return record


def is_audit(record: Mapping) -> bool:
    """Whether a run is an audit."""
    return "tries" in record["settings"]


def made_by(record: Mapping, shown: Shown) -> list[tuple[str, str]]:
    """Settings, versions, dates and hashes of a run, as its ``run.json`` has them."""
    last = (record.get("sessions") or [{}])[-1]
    settings = record["settings"]
    known = {
        "Model": shown.text(settings["model"]),
        "Hashes of the model": as_text(settings.get("revision")),
        "Versions": as_text(last.get("versions")),
        "Commit": last.get("git_commit"),
        "Device": last.get("device"),
        "Date": last.get("date"),
        "Seconds": record.get("seconds"),
        "Seed, steps, noises": ", ".join(
            f"{key} {settings[key]}" for key in ("seed", "steps", "noises", "num_images") if key in settings
        ),
    }
    return [(name, str(value)) for name, value in known.items() if value not in (None, "")]


def as_text(value: object) -> str:
    """A table of settings in one line."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {as_text(inner)}" for key, inner in value.items())
    return "" if value is None else value if isinstance(value, str) else json.dumps(value)


def deciding(record: Mapping) -> tuple[list[str], float | None]:
    """Names of the scores of a detection run, and what the first of them is flagged from; None without a threshold."""
    names = score_names(record["settings"])
    thresholds = (record.get("sessions") or [{}])[-1].get("thresholds", {})
    return names, thresholds.get(names[0]) if names else None


def interval(share: Mapping) -> str:
    """``.250 [.032, .651]`` of a share of an audit."""
    return f"{share['share']:.3f} [{share['low']:.3f}, {share['high']:.3f}]" if share["pictures"] else ""
