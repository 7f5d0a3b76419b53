"""One way to say that the input is wrong, and how text of others is shown."""

from __future__ import annotations

import unicodedata

TURNS = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")  # marks that reorder what is shown


class InputError(Exception):
    """Bad arguments or input: its text is one clear line that says what to do."""

    def __str__(self) -> str:
        return printable(super().__str__())


class AlreadySaid(InputError):
    """What the main process of several says; the others end by it without a word."""


def printable(text: str) -> str:
    """``text`` as one line of which a terminal obeys nothing: control characters and the like are escaped."""
    return text if text.isprintable() else "".join(map(_escaped, text))


def _escaped(letter: str) -> str:
    obeyed = letter in TURNS or unicodedata.category(letter) in ("Cc", "Cs", "Zl", "Zp")
    return letter.encode("unicode_escape").decode() if obeyed else letter
