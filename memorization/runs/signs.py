"""How processes that share a folder hear of each other: each says in a file how far it is, and that it lives."""

from __future__ import annotations

import json
import os
import threading
import time
import traceback
from contextlib import suppress
from pathlib import Path

from memorization.errors import AlreadySaid, InputError
from memorization.io.files import parse_object, write_atomically, writing
from memorization.launch import Launch

# Seconds. Network file systems may show a file's change to other machines a minute late.
BEAT = 5.0  # between two signs of life, and between two looks at others beside one's own work
SILENCE = 180.0  # without one, after which a process counts as dead
MEETING = 900.0  # until all processes have loaded the model
LOOK = 0.5  # between two looks at others that are waited for


class Sign:
    """What a process says, in a file whose time changes while it lives. Its ``token`` is that of its launch."""

    def __init__(self, path: Path, **word: object) -> None:
        self.path, self._word, self._ended = path, {}, threading.Event()
        with writing(path.parent):
            path.parent.mkdir(parents=True, exist_ok=True)
        self.say(**word)
        threading.Thread(target=self._beat, daemon=True).start()

    def say(self, **word: object) -> None:
        """Say something more."""
        self._word |= word
        write_atomically(self.path, json.dumps(self._word))

    def _beat(self) -> None:
        while not self._ended.wait(BEAT):
            with suppress(OSError):
                os.utime(self.path)

    def end(self, error: BaseException | None) -> None:
        """Fall silent, and leave nothing; of an error say why, and what led to it."""
        self._ended.set()
        with suppress(InputError, OSError):
            if error is None:
                self.path.unlink(missing_ok=True)
                return
            unforeseen = f"{type(error).__name__} {error}".strip() + f" (more in {self.path})"
            why = str(error) if isinstance(error, InputError) else unforeseen
            self.say(failed=why, traceback=traceback.format_exception(error))


class Peer:
    """Another process of a launch, by its :class:`Sign`.

    What its file holds at first may be a dead one's: it counts once it changes. Each change is a sign of life, and no
    clocks are compared.
    """

    def __init__(self, path: Path, place: Launch, rank: int) -> None:
        self.path, self.rank, self.who = path, rank, place.named(rank)
        self._word, self._came, self._since = {}, False, time.monotonic()
        self._seen: tuple[int, bytes] | None = None
        self._seen = self._read()

    def _read(self) -> tuple[int, bytes] | None:
        """Time and content of its file; None where there is none."""
        try:
            with open(self.path, "rb") as file:  # a network file system may show an old time before
                return os.fstat(file.fileno()).st_mtime_ns, file.read()
        except FileNotFoundError:
            return None
        except OSError:  # what was just replaced may be out of reach for a moment
            return self._seen

    def word(self) -> dict:
        """All that it has said; nothing where its file has gone."""
        if (seen := self._read()) != self._seen:
            self._seen, self._since, self._came = seen, time.monotonic(), True
            self._word = (parse_object(seen[1]) if seen else None) or {}
        return self._word

    def look(self, token: str) -> dict:
        """What it has said, as one of the launch of that token that has not stopped before it was done.

        Raises:
            InputError: it does not come, has stopped, or gives no sign of life; or another launch goes on.
        """
        word = self.word()
        if word and word["token"] != token:
            raise InputError(f"{self.path.parent.parent}: another launch goes on with this run")
        if "done" in word:
            return word
        if "failed" in word:
            raise InputError(f"{self.who}: {word['failed']}") if self.rank else AlreadySaid(word["failed"])
        silent = time.monotonic() - self._since
        if not self._came and silent > MEETING:
            raise InputError(f"{self.who} has not come within {MEETING:g} seconds; to make a run in one process of a "
                             "launch alone, unset WORLD_SIZE there")  # fmt: skip
        if self._came and silent > SILENCE:
            raise InputError(f"{self.who} has given no sign of life for {SILENCE:g} seconds; give the same command "
                             "again, with any number of processes: it goes on with what is there")  # fmt: skip
        return word
