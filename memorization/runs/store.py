"""The crash-safe result store of a run: ``scores.jsonl``, a line a prompt, and ``run.json``, what made it."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Self

from tqdm import tqdm

from memorization.errors import InputError, printable
from memorization.io.files import LineFile, read_lines, scored_lines, size_of_lines, write_atomically
from memorization.io.records import read_record
from memorization.launch import launched
from memorization.paths import ROOT

PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "numpy")


class Store:
    """Where a run's lines go, and which of them are still to be made. Use it as a context manager.

    Attributes:
        name: of the run, for progress bars.
        record: of the run: settings, and such as the batch size that memory allowed.
        done: how many lines there are.
    """

    name: str
    record: dict
    done: int

    @property
    def rows(self) -> list[dict]:
        """The lines."""
        raise NotImplementedError

    @property
    def anew(self) -> bool:
        """Whether there is no line yet, so that what an overwritten run left beside its lines may go."""
        return self.done == 0

    def lacks(self, count: int) -> bool:
        """Whether lines of a list of ``count`` are missing."""
        return self.done < count

    def batches(self, count: int, size: int, unit: str = "prompt") -> Iterator[range]:
        """The numbers of lines to make for a list of ``count``, batch by batch, each to be followed by :meth:`add`.

        Batches lie on a fixed grid, so a resumed run computes its last one again. Draws a bar of ``unit``s.
        """
        with tqdm(total=count, initial=self._made(count), desc=printable(self.name), unit=unit, smoothing=0) as bar:
            for numbers in self._grid(count, size):
                yield numbers
                bar.update(self._made(count) - bar.n)
            bar.update(self._made(count) - bar.n)

    def _made(self, count: int) -> int:
        """How many lines of a list of ``count`` there are, for the bar."""
        return self.done

    def _grid(self, count: int, size: int) -> Iterator[range]:
        """The batches from the first line on that is missing."""
        for start in range(self.done // size * size, count, size):
            yield range(start, min(start + size, count))

    def add(self, rows: list[dict]) -> None:
        """Keep those lines of a batch that are missing."""
        self.append([row for row in rows if row["id"] >= self.done])

    def append(self, rows: list[dict]) -> None:
        """Keep whole lines, which are the next ones."""
        raise NotImplementedError

    def start(self) -> None:
        """Say that scoring goes on from here."""

    def save(self, status: str) -> None:
        """Keep the record."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind, error, trace) -> None:
        """Let go of it."""


class MemoryStore(Store):
    """Lines in memory: nothing is written."""

    def __init__(self, settings: dict) -> None:
        self.name, self.record, self.done = "scores", {"settings": settings}, 0
        self._rows: list[dict] = []

    @property
    def rows(self) -> list[dict]:
        """The lines."""
        return self._rows

    def append(self, rows: list[dict]) -> None:
        """Keep whole lines."""
        self._rows += rows
        self.done += len(rows)


class ResultStore(Store):
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
        InputError: the folder cannot be written, is in use, or holds a run with other settings; or this is one of
            several processes, which :mod:`~memorization.runs.processes` is for.
    """

    shared = False  # among the processes of a launch

    def __init__(
        self, folder: Path, settings: dict, info: dict, overwrite: bool = False, name: str = "scores.jsonl"
    ) -> None:
        if launched().count > 1 and not self.shared:
            raise InputError("this is not shared among processes: start it as one, or unset WORLD_SIZE")
        self.folder, self.scores, self.name = folder, folder / name, folder.name
        self._lines = LineFile(self.scores, "another run is writing to it; wait for it or choose another --out")
        try:
            self._open(settings, overwrite)
        except BaseException:
            self._lines.close()
            raise
        self._this_time = {**info, **environment()}
        self._started: float | None = None
        self._found_whole = False  # by lacks

    def _open(self, settings: dict, overwrite: bool) -> None:
        """Look at what is there, and cut what is torn."""
        earlier = {} if overwrite else self._earlier(settings)
        self.done = 0 if overwrite else sum(1 for _ in scored_lines(self.scores))
        self._lines.cut(size_of_lines(self.scores, self.done))
        self.record = earlier or {"status": "running", "seconds": 0.0, "settings": settings}

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
        if what := differences(earlier["settings"], settings):
            raise InputError(f"{self.folder} holds a run with other settings ({what}); --overwrite, or another --out")
        return earlier

    def lacks(self, count: int) -> bool:
        """Whether lines of a list of ``count`` are missing.

        Raises:
            InputError: there are more than that.
        """
        if self.done > count:
            raise InputError(f"{self.scores}: holds {self.done} lines for {count} prompts; start anew with --overwrite")
        self._found_whole = self.done == count
        return not self._found_whole

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

    def __exit__(self, kind, error, trace) -> None:
        try:
            if self._started is not None:
                self.record["seconds"] = round(self.record["seconds"] + time.monotonic() - self._started, 1)
                self.save("complete" if kind is None else "stopped")
            elif kind is None and self._found_whole and self.record["status"] != "complete":
                self.save("complete")  # it was killed after its last line
        finally:
            self._lines.close()


def differences(stored: dict, wanted: dict) -> str:
    """What two settings differ in, in words; empty where in nothing."""
    there, asked = _flat(stored), _flat(json.loads(json.dumps(wanted)))
    changed = [key for key in sorted(there.keys() | asked.keys()) if there.get(key) != asked.get(key)]
    return "; ".join(f"{key}: {there.get(key)} there, {asked.get(key)} asked" for key in changed)


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
