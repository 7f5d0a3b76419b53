"""What the reports of all kinds of runs share."""

from __future__ import annotations

import json
from collections.abc import Mapping

from memorization.evaluation.runs import score_names


def made_by(record: Mapping) -> list[tuple[str, str]]:
    """Settings, versions, dates and hashes of a run, as its ``run.json`` has them."""
    last = (record.get("sessions") or [{}])[-1]
    settings = record["settings"]
    known = {
        "Model": settings.get("model"),
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
