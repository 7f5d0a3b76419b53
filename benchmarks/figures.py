"""The figures of ``benchmarks/on_cuda.py``: one JSON file, and the tables made of it. Needs no torch."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

from memorization.errors import InputError, printable
from memorization.io.files import read_json, write_atomically
from memorization.runs.store import environment

NETWORKS = ("SD 1.4", "SDXL", "SD 3", "Flux.1")  # the tool scores the first alone yet
PLAIN, TOOL, BARE = "plain loop of the public code", "this tool", "bare calls"
SCORES = ("norm", "cosine", "anisotropy")


class Figures:
    """Rows of a JSON file, which is replaced as a whole with each new one: a killed run keeps what it has.

    The same command goes on with a file that lacks rows; errors and failed tests are tried again.

    Args:
        about: what all rows hold for (the card, the versions). A file about something else is refused.
        seconds: how long measuring may go on.
        overwrite: forget what the file holds.

    Attributes:
        left: rows that there was no time for.

    Raises:
        InputError: the file is damaged, or about something else.
    """

    def __init__(self, path: Path, about: dict, seconds: float, overwrite: bool = False) -> None:
        self.path, self.left = path, []
        self._until = time.monotonic() + seconds
        found = read_json(path) if path.exists() and not overwrite else {"about": about, "sessions": [], "rows": []}
        if found.get("about") != about:
            raise InputError(f"{path}: holds figures of another card or other versions; --overwrite, or another --out")
        self._record = {**found, "sessions": [*found["sessions"], environment()]}
        self.rows = [row for row in found["rows"] if "error" not in row and not row.get("failed")]

    def measure(self, what: dict, work: Callable[[], dict], seconds: float = 5) -> None:
        """Add the row ``{**what, **work()}``, unless it is there or less than ``seconds`` are left.

        An error is noted in the row: it must not cost the others.
        """
        if any(what.items() <= row.items() for row in self.rows):
            return
        if time.monotonic() + seconds > self._until:
            self.left.append(what)
            return
        print(printable(", ".join(map(str, what.values()))), file=sys.stderr)
        try:
            found = work()
        except Exception as error:
            found = {"error": " ".join(f"{type(error).__name__}: {error}".split())[:200]}
        self.rows.append({**what, **found})
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self.path, json.dumps({**self._record, "rows": self.rows}, indent=1) + "\n")

    @property
    def failed(self) -> list[dict]:
        """Rows whose measuring broke, and tests that failed. A card that is too small for a row is none."""
        return [row for row in self.rows if row.get("failed") or "OutOfMemory" not in row.get("error", "OutOfMemory")]


def score_rows(rows: list[dict]) -> list[dict]:
    """The table of scores on the card against those on the CPU in float32."""
    return [
        {"model": row["model"], "dtype": row["dtype"], "score": score, "prompts": row["prompts"],
         **{name: f"{value:.3g}" for name, value in row[score].items()}}
        for row in rows if row["part"] == "scores" and "error" not in row for score in SCORES
    ]  # fmt: skip


def speed_rows(rows: list[dict], *, best: bool = False) -> list[dict]:
    """The table of speed.

    Args:
        best: of each network, dtype and way, the fastest batch alone.
    """
    rows = [row for row in rows if row["part"] == "speed"]
    plain = {row["dtype"]: row["seconds a prompt"] for row in rows if row["what"] == PLAIN and "error" not in row}
    if best:
        rows = _fastest(rows)
    return [_speed_row(row, plain.get(row["dtype"])) for row in rows]


def _fastest(rows: list[dict]) -> list[dict]:
    found: dict[tuple, dict] = {}
    for row in rows:
        key = tuple(row[name] for name in ("network", "dtype", "what", "how"))
        if "error" not in row and (key not in found or row["seconds a row"] < found[key]["seconds a row"]):
            found[key] = row
    return list(found.values())


def _speed_row(row: dict, plain: float | None) -> dict:
    """A line of the table; ``plain`` are the seconds a prompt of the plain loop."""
    prompt, share, memory = row.get("seconds a prompt"), row.get("share of peak"), row.get("peak memory, GiB")
    return {
        **{name: row[name] for name in ("network", "dtype", "what", "how")},
        "batch": row.get("batch used", row["batch"]),
        "ms a row": f"{1000 * row['seconds a row']:.3g}" if "seconds a row" in row else row["error"],
        "ms a prompt": f"{1000 * prompt:.3g}" if prompt else "",
        "times the plain loop": f"{plain / prompt:.3g}" if prompt and plain else "",
        "share of the peak": f"{share:.0%}" if share else "",
        "peak memory, GiB": f"{memory:.3g}" if memory else "",
    }
