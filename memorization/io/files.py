"""Files that are whole or not there: atomic writing, lines that one process appends to, reading that names the file."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from memorization.errors import InputError


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """What the system has against writing ``path`` (a full disk, a folder that is missing) becomes an InputError."""
    try:
        yield
    except (OSError, ValueError, SafetensorError) as error:  # ValueError: a name that holds a null
        raise InputError(f"{path}: cannot be written ({_reason(error)})") from None


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file to write, which becomes ``path`` in one step when the block ends, and goes when it fails.

    Links are followed, so that a link stays one.

    Raises:
        InputError: ``path`` is something else than a regular file, or cannot be written.
    """
    with writing(path):
        target = Path(os.path.realpath(path))
        if os.path.lexists(target) and not is_file(target):  # a link is left where links go in a circle
            raise InputError(f"{path}: is no regular file, and is not replaced")
        part = target.with_name(f"{target.name}.part")
        part.unlink(missing_ok=True)  # of a killed process; or a link, which would be followed
        try:
            yield part
            part.replace(target)
        finally:
            part.unlink(missing_ok=True)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replace ``path`` by ``content`` in one step; text as UTF-8 and with plain newlines on every system.

    Raises:
        InputError: as :func:`replacing`.
    """
    with replacing(path) as part:
        part.write_bytes(content if isinstance(content, bytes) else _encoded(content))


def _encoded(text: str) -> bytes:
    """UTF-8; what it cannot hold, as the bytes of an odd file's name, in the escapes that JSON reads back."""
    return text.encode("utf-8", "backslashreplace")


def is_file(path: Path) -> bool:
    """Whether there is such a regular file; a name that the system does not take is none."""
    try:
        return path.is_file()
    except OSError:
        return False


def read_file(path: Path) -> bytes:
    """What a regular file holds.

    Raises:
        InputError: as :func:`reading`.
    """
    with reading(path) as file:
        return file.read()


@contextmanager
def reading(path: Path) -> Iterator[BinaryIO]:
    """A regular file, open.

    Raises:
        InputError: there is none (a pipe would be waited for without end), or it cannot be read.
    """
    try:
        if path.exists() and not path.is_file():
            raise InputError(f"{path}: is no regular file")
        with open(path, "rb") as file:
            yield file
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({_reason(error)})") from None


def parse_object(line: str | bytes) -> dict[str, Any] | None:
    """A JSON object; None where ``line`` is none."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def read_json(path: Path) -> dict[str, Any]:
    """A file that holds a JSON object.

    Raises:
        InputError: it cannot be read, or holds none.
    """
    if (found := parse_object(read_file(path))) is None:
        raise InputError(f"{path}: damaged: holds no JSON object")
    return found


def line_of(row: dict) -> bytes:
    """A row as its line of a JSON Lines file."""
    return _encoded(json.dumps(row, ensure_ascii=False) + "\n")


def whole_lines(path: Path, advice: str) -> Iterator[dict]:
    """The complete lines of a JSON Lines file, one at a time; none where there is no file.

    A last line without its end, which a killed process left, is not counted: the one rule for all such files.

    Args:
        advice: what to do about a damaged file.

    Raises:
        InputError: a line before the last is no JSON object, or it is no regular file.
    """
    if not path.exists():
        return
    if not path.is_file():
        raise InputError(f"{path}: is no regular file")
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                return
            if (row := parse_object(line)) is None:
                raise InputError(f"{path}, line {number}: damaged; {advice}")
            yield row


def scored_lines(path: Path) -> Iterator[dict]:
    """Complete lines of a run's ``scores.jsonl``, whose ``id`` counts from 0.

    Raises:
        InputError: a line before the last is damaged.
    """
    advice = "start anew with --overwrite"
    for number, row in enumerate(whole_lines(path, advice)):
        if type(row.get("id")) is not int or row["id"] != number:
            raise InputError(f"{path}, line {number + 1}: id is not {number}: damaged; {advice}")
        yield row


def size_of_lines(path: Path, count: int) -> int:
    """Bytes of the first ``count`` lines as they lie in the file, whoever wrote them."""
    if not path.exists():
        return 0
    with open(path, "rb") as file:
        return sum(map(len, islice(file, count)))


def read_whole_lines(path: Path, advice: str) -> tuple[list[dict], int]:
    """All of :func:`whole_lines`, and their size in bytes."""
    rows = list(whole_lines(path, advice))
    return rows, size_of_lines(path, len(rows))


def read_lines(path: Path) -> tuple[list[dict], int]:
    """All of :func:`scored_lines`, and their size in bytes."""
    rows = list(scored_lines(path))
    return rows, size_of_lines(path, len(rows))


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
        with writing(path.parent):
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.exists() and not path.is_file():
                raise InputError(f"{path}: is no regular file")
            try:
                self._lock.acquire(timeout=0)
            except Timeout:
                raise InputError(f"{path.parent}: {busy}") from None
        try:
            self._open()
        except InputError:
            self._lock.release()
            raise

    def _open(self) -> None:
        with writing(self.path.parent):
            self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115 - held until close

    def cut(self, size: int) -> None:
        """Forget what lies beyond ``size`` bytes: a torn last line, or everything."""
        self._file.truncate(size)

    def append(self, rows: Iterable[dict]) -> None:
        """Write whole lines.

        Raises:
            InputError: the disk is full.
        """
        left = memoryview(b"".join(map(line_of, rows)))
        with writing(self.path):
            while left:
                left = left[self._file.write(left) :]

    def sync(self) -> None:
        """Bring all lines to the disk, and before the eyes of other machines."""
        with writing(self.path):
            os.fsync(self._file.fileno())

    def replace(self, rows: Iterable[dict]) -> None:
        """Put other lines in the place of all, in one step."""
        self._file.close()
        try:
            write_atomically(self.path, b"".join(map(line_of, rows)))
        finally:
            self._open()

    def close(self) -> None:
        """Let go of the file."""
        self._file.close()
        self._lock.release()

    def __enter__(self) -> LineFile:
        return self

    def __exit__(self, kind, error, trace) -> None:
        self.close()


def sha256_of(path: Path) -> str:
    """Of a file; read again only where its size or time has changed."""
    status = path.stat()
    return _sha256(path, status.st_ino, status.st_size, status.st_mtime_ns)


@cache
def _sha256(path: Path, inode: int, size: int, time: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
