"""One way to say that the input is wrong, and what a script does then."""

from __future__ import annotations


class InputError(Exception):
    """Bad arguments or input: its text is one clear line that says what to do."""
