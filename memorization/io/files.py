"""Files that are whole or not there: atomic writing, and reading that names the file."""

from __future__ import annotations

import json
from pathlib import Path

from memorization.errors import InputError


def write_atomically(path: Path, text: str) -> None:
    """Replace ``path`` by ``text`` in one step.

    Raises:
        InputError: the folder is missing or cannot be written.
    """
    part = path.with_name(path.name + ".part")
    try:
        part.write_text(text, encoding="utf-8")
        part.replace(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror})") from None


def read_json(path: Path) -> dict:
    """A JSON file, or an :class:`InputError` that names it."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({error})") from None


def read_lines(path: Path) -> tuple[list[dict], int]:
    """Complete lines of a ``scores.jsonl`` and their size in bytes; a torn last line is not counted.

    Raises:
        InputError: a line before the last is damaged.
    """
    content = path.read_bytes() if path.exists() else b""
    whole = content[: content.rfind(b"\n") + 1]
    rows = []
    for number, line in enumerate(whole.splitlines()):
        try:
            row = json.loads(line)
            if row["id"] != number:
                raise ValueError
            rows.append(row)
        except (ValueError, KeyError, TypeError):
            raise InputError(f"{path}, line {number + 1}: damaged; start anew with --overwrite") from None
    return rows, len(whole)
