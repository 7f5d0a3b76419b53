"""What the fault suite shares: what a fault may come to, and how files are damaged."""

import math
import os
import resource
import signal
from contextlib import contextmanager

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from memorization.errors import InputError

LETTERS = st.text(st.characters(exclude_categories=[]), max_size=30)  # surrogates and control characters too
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**400), 10**400) | st.floats() | LETTERS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(LETTERS, inner, max_size=3),
    max_leaves=6,
)


def examples(count):
    """Settings of a property: so many examples, the same each time."""
    ignored = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
    return settings(max_examples=count, deadline=None, derandomize=True, database=None, suppress_health_check=ignored)


def refused(call, *said):
    """See that a call is refused in one printable line that holds the words of ``said``; gives back the line."""
    with pytest.raises(InputError) as caught:
        call()
    line = str(caught.value)
    assert line and "\n" not in line and "\x1b" not in line and len(line) < 4000
    for word in said:
        assert word in line
    return line


def taken_or_refused(call):
    """What a call gives; None where it is refused in one line. Any other end is a fault."""
    try:
        return call()
    except InputError as error:
        assert "\n" not in str(error) and "\x1b" not in str(error)
        return None


def damaged(data, content: bytes) -> bytes:
    """``content`` with a few bytes changed, cut out or put in, or its end missing; drawn from ``data``."""
    found = bytearray(content)
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, max(0, len(found) - 1)))
        found[place : place + data.draw(st.integers(0, 12))] = data.draw(st.binary(max_size=6))
    return bytes(found[: data.draw(st.integers(0, len(found)))] if data.draw(st.booleans()) else found)


@contextmanager
def full_disk(size=0):
    """No file may grow beyond ``size`` bytes meanwhile."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)


@contextmanager
def within(seconds):
    """Fail instead of waiting longer, as for a pipe that nobody writes to."""

    def late(number, frame):
        raise AssertionError(f"not done after {seconds} seconds")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def make_odd(path, kind):
    """Put something that is no regular file at ``path``."""
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "loop":
        path.symlink_to(path)
    elif kind == "device":
        path.symlink_to("/dev/null")
    return path


def cases_of(module):
    """How many cases the tests of a module try: rows of their tables, and examples of their properties."""
    found = 0
    for name, test in vars(module).items():
        if name.startswith("test_"):
            tables = [mark.args[1] for mark in getattr(test, "pytestmark", []) if mark.name == "parametrize"]
            own = getattr(test, "_hypothesis_internal_use_settings", None)
            found += math.prod(map(len, tables)) * (own.max_examples if own else 1)
    return found


ODD = ("pipe", "folder", "loop", "device")
NAMES = ("we$ird$", "two\nlines", "red\x1b[31m", os.fsdecode(b"caf\xe9"), "b" * 300, "nu\0ll", "a b", "-x", "名前")
