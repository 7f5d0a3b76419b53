"""The crash-safe result store of a run: ``scores.jsonl``, a line a prompt, and ``run.json``, what made it."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from memorization.errors import InputError
from memorization.io.files import LineFile, read_lines, scored_lines, size_of_lines, write_atomically
from memorization.io.records import read_record
from memorization.paths import ROOT

PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "numpy")


class MemoryStore:
    """What :class:`ResultStore` offers to a run, without a folder: nothing is written.

    Attributes:
        rows: the lines.
        record: of the run, such as the batch size that memory allowed.
    """

    name = "scores"

    def __init__(self, settings: dict) -> None:
        self.rows: list[dict] = []
        self.record: dict = {"settings": settings}

    @property
    def done(self) -> int:
        """How many prompts have their line."""
        return len(self.rows)

    def lacks(self, count: int) -> bool:
        """Whether lines of a list of ``count`` are missing."""
        return self.done < count

    def append(self, rows: list[dict]) -> None:
        """Keep whole lines."""
        self.rows += rows

    def start(self) -> None:
        """Nothing to say to anybody."""

    def save(self, status: str) -> None:
        """Nothing to write."""

    def __enter__(self) -> MemoryStore:
        return self

    def __exit__(self, kind, error, trace) -> None:
        """Nothing to close."""


class ResultStore:
    """One run's folder, held by one process at a time. Use it as a context manager.

    Args:
        folder: made if missing.
        settings: everything the scores depend on. A folder whose stored settings differ is refused.
        info: recorded, not compared (command, device, ...).
        overwrite: forget what the folder holds.
        name: of the file of lines.

    Attributes:
        done: how many prompts have their line.
        record: what ``run.json`` holds: settings, status, seconds, and the sessions that made the scores.

    Raises:
        InputError: the folder cannot be written, is in use, or holds a run with other settings.
    """

    def __init__(
        self, folder: Path, settings: dict, info: dict, overwrite: bool = False, name: str = "scores.jsonl"
    ) -> None:
        self.folder, self.scores = folder, folder / name
        self._lines = LineFile(self.scores, "another run is writing to it; wait for it or choose another --out")
        try:
            earlier = {} if overwrite else self._earlier(settings)
            self.done = 0 if overwrite else sum(1 for _ in scored_lines(self.scores))
        except InputError:
            self._lines.close()
            raise
        self._lines.cut(size_of_lines(self.scores, self.done))
        self.record = earlier or {"status": "running", "seconds": 0.0, "settings": settings}
        self._this_time = {**info, **environment()}
        self._started: float | None = None

    @property
    def name(self) -> str:
        """Of the run, for progress bars."""
        return self.folder.name

    @property
    def rows(self) -> list[dict]:
        """The lines."""
        return read_lines(self.scores)[0]

    @property
    def started(self) -> bool:
        """Whether this process has said that it writes."""
        return self._started is not None

    def _earlier(self, settings: dict) -> dict:
        """What the folder's ``run.json`` holds, if it has one."""
        path = self.folder / "run.json"
        if not path.exists():
            if self.scores.stat().st_size:
                raise InputError(f"{self.scores}: has no run.json beside it; choose another --out or --overwrite")
            return {}
        earlier = read_record(path)
        stored, wanted = _flat(earlier["settings"]), _flat(json.loads(json.dumps(settings)))
        changed = [key for key in sorted(stored.keys() | wanted.keys()) if stored.get(key) != wanted.get(key)]
        if changed:
            what = "; ".join(f"{key}: {stored.get(key)} there, {wanted.get(key)} asked" for key in changed)
            raise InputError(f"{self.folder} holds a run with other settings ({what}); --overwrite, or another --out")
        return earlier

    def lacks(self, count: int) -> bool:
        """Whether lines of a list of ``count`` are missing.

        Raises:
            InputError: there are more than that.
        """
        if self.done > count:
            raise InputError(f"{self.scores}: holds {self.done} lines for {count} prompts; start anew with --overwrite")
        return self.done < count

    def append(self, rows: list[dict]) -> None:
        """Write whole lines and flush them."""
        self._lines.append(rows)
        self.done += len(rows)

    def start(self) -> None:
        """Say in ``run.json`` that scoring goes on from here, by whom and on what. Without it nothing is rewritten."""
        self._started = time.monotonic()
        self.record.setdefault("sessions", []).append({"from": self.done, **self._this_time})
        self.save("running")

    def save(self, status: str) -> None:
        """Write ``run.json``; of a complete run it says how many lines there are."""
        self.record["status"] = status
        if status == "complete":
            self.record["lines"] = self.done
        write_atomically(self.folder / "run.json", json.dumps(self.record, indent=1, ensure_ascii=False) + "\n")

    def __enter__(self) -> ResultStore:
        return self

    def __exit__(self, kind, error, trace) -> None:
        try:
            if self._started is not None:
                self.record["seconds"] = round(self.record["seconds"] + time.monotonic() - self._started, 1)
                self.save("complete" if kind is None else "stopped")
        finally:
            self._lines.close()


Store = ResultStore | MemoryStore


def _flat(settings: dict, of: str = "") -> dict:
    """Settings with those in them beside them, as ``revision.unet``: what differs is named, and nothing else."""
    found = {}
    for key, value in settings.items():
        found |= _flat(value, f"{of}{key}.") if isinstance(value, dict) and value else {f"{of}{key}": value}
    return found


def environment() -> dict:
    """What made a result: command, commit, versions, time."""
    try:
        git = subprocess.run(["git", "-C", ROOT, "rev-parse", "HEAD"], capture_output=True, text=True)
        commit = git.stdout.strip() or None
    except OSError:  # no git on this machine
        commit = None
    return {
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "git_commit": commit,
        "versions": {"python": sys.version.split()[0], **{name: version(name) for name in PACKAGES}},
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
