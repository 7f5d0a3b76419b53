"""The crash-safe result store of a run: ``scores.jsonl``, a line a prompt, and ``run.json``, what made it."""

from __future__ import annotations

import fcntl
import json
import subprocess
import sys
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from memorization.errors import InputError
from memorization.io.files import read_json, read_lines, write_atomically
from memorization.paths import ROOT

PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "numpy")


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
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = open(self.scores, "ab")  # noqa: SIM115 - held, and locked, until __exit__
        except OSError as error:
            raise InputError(f"{folder}: cannot be written ({error.strerror})") from None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{folder}: another run is writing to it; wait for it or choose another --out") from None
        path = folder / "run.json"
        earlier = {}
        if overwrite:
            self._file.truncate(0)
        elif path.exists():
            earlier = read_json(path)
            self._refuse_changes(earlier.get("settings", {}), settings)
        elif self.scores.stat().st_size:
            raise InputError(f"{self.scores}: has no run.json beside it; choose another --out or --overwrite")
        rows, size = read_lines(self.scores)
        self._file.truncate(size)  # a torn last line goes
        self.done = len(rows)
        self.record = earlier or {"status": "running", "seconds": 0.0, "settings": settings}
        self._this_time = {**info, **_environment()}
        self._started = None

    @property
    def started(self) -> bool:
        """Whether this process has said that it writes."""
        return self._started is not None

    def _refuse_changes(self, stored: dict, wanted: dict) -> None:
        wanted = json.loads(json.dumps(wanted))
        changed = [key for key in sorted(stored.keys() | wanted.keys()) if stored.get(key) != wanted.get(key)]
        if changed:
            what = "; ".join(f"{key}: {stored.get(key)} there, {wanted.get(key)} asked" for key in changed)
            raise InputError(f"{self.folder} holds a run with other settings ({what}); --overwrite, or another --out")

    def append(self, rows: list[dict]) -> None:
        """Write whole lines and flush them."""
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        self._file.write(text.encode())
        self._file.flush()
        self.done += len(rows)

    def start(self) -> None:
        """Say in ``run.json`` that scoring goes on from here, by whom and on what. Without it nothing is rewritten."""
        self._started = time.time()
        self.record.setdefault("sessions", []).append({"from": self.done, **self._this_time})
        self.save("running")

    def save(self, status: str) -> None:
        """Write ``run.json``."""
        self.record["status"] = status
        write_atomically(self.folder / "run.json", json.dumps(self.record, indent=1, ensure_ascii=False) + "\n")

    def __enter__(self) -> ResultStore:
        return self

    def __exit__(self, kind, error, trace) -> None:
        if self.started:
            self.record["seconds"] = round(self.record["seconds"] + time.time() - self._started, 1)
            self.save("complete" if kind is None else "stopped")
        self._file.close()


def _environment() -> dict:
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
