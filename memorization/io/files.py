"""Files that are whole or not there: atomic writing, lines that one process appends to, reading that names the file."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from filelock import FileLock, Timeout

from memorization.errors import InputError


def write_atomically(path: Path, text: str) -> None:
    """Replace ``path`` by ``text`` in one step, UTF-8 and with plain newlines on every system.

    Raises:
        InputError: the folder is missing or cannot be written.
    """
    part = path.with_name(path.name + ".part")
    try:
        part.write_text(text, encoding="utf-8", newline="\n")
        part.replace(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror})") from None


def read_json(path: Path) -> dict:
    """A JSON file, or an :class:`InputError` that names it."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({error})") from None


def line_of(row: dict) -> bytes:
    """A row as its line of a JSON Lines file."""
    return (json.dumps(row, ensure_ascii=False) + "\n").encode()


def read_whole_lines(path: Path, advice: str) -> tuple[list[dict], int]:
    """The complete lines of a JSON Lines file and their size in bytes; none where there is no file.

    A last line without its end, which a killed process left, is not counted: the one rule for all such files.

    Args:
        advice: what to do about a damaged file.

    Raises:
        InputError: a line before the last is no JSON object.
    """
    content = path.read_bytes() if path.exists() else b""
    whole = content[: content.rfind(b"\n") + 1]
    rows = []
    for number, line in enumerate(whole.split(b"\n")[:-1], 1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict):
            raise InputError(f"{path}, line {number}: damaged; {advice}")
        rows.append(row)
    return rows, len(whole)


def read_lines(path: Path) -> tuple[list[dict], int]:
    """Complete lines of a run's ``scores.jsonl``, whose ``id`` counts from 0, and their size in bytes.

    Raises:
        InputError: a line before the last is damaged.
    """
    advice = "start anew with --overwrite"
    rows, size = read_whole_lines(path, advice)
    for number, row in enumerate(rows):
        if row.get("id") != number:
            raise InputError(f"{path}, line {number + 1}: damaged; {advice}")
    return rows, size


class LineFile:
    """A JSON Lines file that one process at a time appends to.

    Args:
        path: its folder is made if missing. Beside it lies ``.<name>.lock``, empty; it stays, since without it two
            processes could each believe to hold the file.
        busy: what to say where another process holds it.

    Raises:
        InputError: the folder cannot be written, or another process holds the file.
    """

    def __init__(self, path: Path, busy: str) -> None:
        self.path, self._lock = path, FileLock(path.with_name(f".{path.name}.lock"))
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(timeout=0)
        except Timeout:
            raise InputError(f"{path.parent}: {busy}") from None
        except OSError as error:
            raise InputError(f"{path.parent}: cannot be written ({error.strerror})") from None
        try:
            self._file = open(path, "ab")  # noqa: SIM115 - held until close
        except OSError as error:
            self._lock.release()
            raise InputError(f"{path.parent}: cannot be written ({error.strerror})") from None

    def cut(self, size: int) -> None:
        """Forget what lies beyond ``size`` bytes: a torn last line, or everything."""
        self._file.truncate(size)

    def append(self, rows: Iterable[dict]) -> None:
        """Write whole lines and flush them."""
        self._file.write(b"".join(map(line_of, rows)))
        self._file.flush()

    def close(self) -> None:
        """Let go of the file."""
        self._file.close()
        self._lock.release()

    def __enter__(self) -> LineFile:
        return self

    def __exit__(self, kind, error, trace) -> None:
        self.close()
