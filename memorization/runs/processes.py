"""One run made by several processes, on any machines that share its folder. See docs/many-gpus.md.

Each process makes every k-th of the batches that are missing and writes its lines to a file of its own; the main
process puts them in order. They need no process group: they tell each other by files in ``<run>/scores.parts/`` what
there is to tell. ``main.json`` is the main process's, ``0001-of-0004-<token>-<settings>.json`` another's, beside its
lines.
"""

from __future__ import annotations

import hashlib
import heapq
import json
import os
import shutil
import threading
import time
import traceback
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from operator import itemgetter
from pathlib import Path
from secrets import token_hex

from tqdm import tqdm

from memorization.errors import AlreadySaid, InputError, printable
from memorization.io.files import (
    LineFile,
    parse_object,
    read_lines,
    scored_lines,
    whole_lines,
    write_atomically,
    writing,
)
from memorization.launch import Launch, check_launch
from memorization.runs.store import MemoryStore, ResultStore, Store, differences

# Seconds. Network file systems may show a file's change to other machines a minute late.
BEAT = 5.0  # between two signs of life, and between two looks at others beside one's own work
SILENCE = 180.0  # without one, after which a process counts as dead
MEETING = 900.0  # until all processes have loaded the model
LOOK = 0.5  # between two looks at others that are waited for

BUSY = "a process of another launch is still writing to it; wait for it, or end it"
AGAIN = "give the same command again, with any number of processes: it goes on with what is there"


def open_store(
    folder: Path | None, settings: dict, info: dict, overwrite: bool = False, name: str = "scores.jsonl"
) -> Store:
    """The store of a run that the processes of a launch share: which one depends on this process's place.

    Args:
        folder: None to keep the lines in memory; then each process makes all of them.
        settings, info, overwrite, name: as :class:`~memorization.runs.store.ResultStore`.

    Raises:
        InputError: as there; or another process does not come, or would score with other settings.
    """
    if folder is None:
        return MemoryStore(settings)
    place = check_launch()
    if not place.main:
        return HelpingStore(place, folder, settings, name)
    if place.count == 1:
        return GatheringStore(folder, settings, info, overwrite, name)
    return LeadingStore(place, folder, settings, {**info, "processes": place.count}, overwrite, name)


def parts_of(scores: Path) -> Path:
    """The folder in which the processes of a launch leave what they have made and have to say."""
    return scores.with_suffix(".parts")


def digits(settings: dict) -> str:
    """What parts that were made with these settings have at the end of their names."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]


# ---------------------------------------------------------------- what processes say
class Voice:
    """A file by which a process tells the others how far it is; its time changes while the process lives."""

    def __init__(self, path: Path, **word: object) -> None:
        self.path, self._word, self._silent = path, {}, threading.Event()
        with writing(path.parent):
            path.parent.mkdir(parents=True, exist_ok=True)
        self.say(**word)
        threading.Thread(target=self._beat, daemon=True).start()

    def say(self, **word: object) -> None:
        """Say something more."""
        self._word |= word
        write_atomically(self.path, json.dumps(self._word))

    def _beat(self) -> None:
        while not self._silent.wait(BEAT):
            with suppress(OSError):
                os.utime(self.path)

    def end(self, error: BaseException | None) -> None:
        """Fall silent, and leave nothing; of an error say why, and what led to it."""
        self._silent.set()
        with suppress(InputError, OSError):
            if error is None:
                self.path.unlink(missing_ok=True)
            elif isinstance(error, InputError):
                self.say(failed=str(error))
            else:
                why = f"{type(error).__name__} {error}".strip()
                self.say(failed=f"{why} (more in {self.path})", traceback=traceback.format_exception(error))


class Ear:
    """What another process says, by its file."""

    def __init__(self, path: Path) -> None:
        self.path, self._word, self._since = path, {}, time.monotonic()
        self._seen: int | None = None

    def word(self) -> dict:
        """All that it has said, as far as is known; nothing where its file is gone."""
        try:
            self._word = parse_object(self.path.read_bytes()) or self._word
        except FileNotFoundError:
            self._word = {}
        except OSError:  # a file that was just replaced may be out of reach for a moment
            pass
        return self._word

    def check_alive(self, who: str) -> None:
        """See that there was a sign of life lately; to be called again and again. Clocks are not compared.

        Raises:
            InputError: there was none for too long.
        """
        try:
            seen = self.path.stat().st_mtime_ns
        except OSError:
            seen = None
        if seen != self._seen:
            self._seen, self._since = seen, time.monotonic()
        if time.monotonic() - self._since > SILENCE:
            raise InputError(f"{who} has given no sign of life for {SILENCE:g} seconds; {AGAIN}")


# ---------------------------------------------------------------- lines in parts
class Held:
    """The lines of parts, in order."""

    def __init__(self, parts: Iterable[Path]) -> None:
        self._lines = heapq.merge(*map(_numbered, parts), key=itemgetter("id"))
        self._next = next(self._lines, None)

    def line(self, number: int) -> dict | None:
        """The line of that number, if there is one; to be asked for in order."""
        while self._next and self._next["id"] < number:
            self._next = next(self._lines, None)
        return self._next if self._next and self._next["id"] == number else None


def _numbered(part: Path) -> Iterator[dict]:
    for row in whole_lines(part, "start anew with --overwrite"):
        if type(row.get("id")) is not int:
            raise InputError(f"{part}: damaged: a line has no id; start anew with --overwrite")
        yield row


class GatheringStore(ResultStore):
    """A run whose lines may lie in parts that an earlier launch left: what they hold is taken, and not made again."""

    shared = True

    def _open(self, settings: dict, overwrite: bool) -> None:
        self._digits = digits(settings)
        for part in parts_of(self.scores).glob("*.jsonl"):
            LineFile(part, BUSY).close()
            if overwrite:
                part.unlink()
        super()._open(settings, overwrite)

    @property
    def anew(self) -> bool:
        """As :attr:`Store.anew`; what lies in parts counts."""
        return super().anew and not self._parts()

    def _parts(self) -> list[Path]:
        return sorted(parts_of(self.scores).glob(f"*-{self._digits}.jsonl"))

    def lacks(self, count: int) -> bool:
        """As :meth:`ResultStore.lacks`."""
        if lacks := super().lacks(count):
            return lacks
        self._end_parts()
        return False

    def _grid(self, count: int, size: int) -> Iterator[range]:
        """The batches that neither the file nor a part holds."""
        held = Held(self._parts())
        for numbers in super()._grid(count, size):
            self._take(held, numbers.stop)
            if self.done < numbers.stop:
                yield numbers
        self._end_parts()

    def _take(self, held: Held, stop: int) -> None:
        """Append the next lines, before ``stop``, as long as they are held."""
        while self.done < stop and (line := held.line(self.done)):
            self.append([line])

    def _end_parts(self) -> None:
        """All lines are in one file."""
        if parts_of(self.scores).is_dir():
            self._lines.sync()
            shutil.rmtree(parts_of(self.scores), ignore_errors=True)


# ---------------------------------------------------------------- several processes
class SharingStore(Store):
    """What the stores of several processes have in common: a voice, and a share of the batches, made into a part."""

    _voice: Voice
    _part: LineFile | None = None
    _batches: deque[range]  # of the share, that are still to be made

    def _take_share(self, place: Launch, part: Path, starts: Sequence[int], size: int, count: int) -> None:
        self._part = LineFile(part, BUSY)
        own = starts[place.rank :: place.count]
        self._batches = deque(range(start, min(start + size, count)) for start in own)

    def _make(self, size: int) -> Iterator[range]:
        """What is left of the share, in pieces of ``size`` at most, which memory may have halved.

        Raises:
            InputError: another process has stopped.
        """
        looked = time.monotonic()
        while self._batches:
            yield self._batches[0][:size]
            if rest := self._batches.popleft()[size:]:
                self._batches.appendleft(rest)
            if time.monotonic() - looked > BEAT:
                self._look()
                looked = time.monotonic()
        self._close_part()

    def _look(self) -> object:
        """See that no other process has stopped."""
        raise NotImplementedError

    def add(self, rows: list[dict]) -> None:
        """As :meth:`Store.add`, to this process's part; what it makes before it has a share, to the whole."""
        if self._part:
            self._part.append(rows)
        else:
            super().add(rows)

    def _close_part(self) -> None:
        if self._part:
            self._part.close()

    def __exit__(self, kind, error, trace) -> None:
        try:
            self._close_part()
            self._voice.end(error)
        finally:
            super().__exit__(kind, error, trace)


class LeadingStore(SharingStore, GatheringStore):
    """The main process's: it says what is missing, makes its own share, and puts all lines in order."""

    def __init__(
        self, place: Launch, folder: Path, settings: dict, info: dict, overwrite: bool = False,
        name: str = "scores.jsonl",
    ) -> None:  # fmt: skip
        self._place, self._token, self._ears = place, token_hex(4), {}
        super().__init__(folder, settings, info, overwrite, name)

    def _open(self, settings: dict, overwrite: bool) -> None:
        self._voice = Voice(parts_of(self.scores) / "main.json", token=self._token)
        try:
            self._meet(settings)
            super()._open(settings, overwrite)
        except BaseException as error:
            self._voice.end(error)
            raise

    def _meet(self, settings: dict) -> None:
        """Wait until all are there.

        Raises:
            InputError: one does not come, or would score with other ``settings``.
        """
        last, ranks, words = time.monotonic() + MEETING, range(1, self._place.count), {}
        with tqdm(total=len(ranks), desc="processes", unit="process", delay=2, leave=False) as bar:
            while away := [rank for rank in ranks if rank not in words]:
                for ear in map(Ear, parts_of(self.scores).glob("*.json")):
                    word = ear.word()
                    if word.get("main") == self._token:  # files of earlier launches have not heard of it
                        self._ears[word["rank"]], words[word["rank"]] = ear, word
                bar.update(len(words) - bar.n)
                if time.monotonic() > last:
                    raise InputError(f"{self._place.named(away[0])} has not come within {MEETING:g} seconds; to make "
                                     "a run in one process of a launch alone, unset WORLD_SIZE there")  # fmt: skip
                time.sleep(LOOK)
        self._voice.say(others={rank: word["token"] for rank, word in words.items()})
        for rank in ranks:
            if what := differences(words[rank]["settings"], settings):
                raise InputError(f"{self._place.named(rank)} has other settings than the main process ({what})")

    def batches(self, count: int, size: int, unit: str = "prompt") -> Iterator[range]:
        """As :meth:`Store.batches`, of this process's share; ends when all have made theirs.

        The bar takes the others to be as fast as this process.

        Raises:
            InputError: another process has stopped.
        """
        if self._part is None:
            self._deal(count, size)
        k, own = self._place.count, sum(map(len, self._batches))
        with tqdm(total=count, initial=max(0, count - k * own), desc=printable(self.name), unit=unit,
                  smoothing=0) as bar:  # fmt: skip
            for numbers in self._make(size):
                yield numbers
                bar.update(min(k * len(numbers), count - bar.n))
            bar.set_postfix_str("until all are done")
            while self._look():
                time.sleep(LOOK)
        self._take(Held(self._parts()), count)
        if self.done < count:
            raise InputError(f"{self.folder}: line {self.done} is in no part; give the same command again")
        self._end_parts()

    def _deal(self, count: int, size: int) -> None:
        """Say which batches are missing, as a whole or in part, and take this process's share of them."""
        held, done = Held(self._parts()), self.done
        starts = [
            numbers.start
            for numbers in Store._grid(self, count, size)
            if any(held.line(number) is None for number in numbers if number >= done)
        ]
        name = f"{self._place.rank:04d}-of-{self._place.count:04d}-{self._token}-{self._digits}.jsonl"
        self._take_share(self._place, parts_of(self.scores) / name, starts, size, count)
        self._voice.say(starts=starts, size=size, batch_size_used=self.record.get("batch_size_used"))

    def _look(self) -> bool:
        """Whether others are still at work.

        Raises:
            InputError: one has stopped.
        """
        at_work = False
        for rank, ear in self._ears.items():
            word = ear.word()
            if not word.get("done"):
                if why := word.get("failed"):
                    raise InputError(f"{self._place.named(rank)}: {why}")
                ear.check_alive(self._place.named(rank))
                at_work = True
        return at_work


class HelpingStore(SharingStore):
    """Another process's: it makes its share of what the main process says is missing, and waits for the whole."""

    anew = False  # the main process has made everything ready

    def __init__(self, place: Launch, folder: Path, settings: dict, name: str) -> None:
        self.folder, self.scores, self.name = folder, folder / name, folder.name
        self.record, self.done = {"settings": settings}, 0
        self._place, self._token, parts = place, token_hex(4), parts_of(self.scores)
        self._main, self._heard = Ear(parts / "main.json"), ""  # the token that it has heard of the main process
        stem = f"{place.rank:04d}-of-{place.count:04d}-{self._token}-{digits(settings)}"
        self._voice = Voice(parts / f"{stem}.json", rank=place.rank, token=self._token, settings=settings)
        try:
            self._meet()
        except BaseException as error:
            self._voice.end(error)
            raise

    def _meet(self) -> None:
        """Wait until the main process has seen this one; it may have gone again, from a run that lacked nothing."""
        last = time.monotonic() + MEETING
        while self._token not in (word := self._main.word()).get("others", {}).values() and (word or not self._heard):
            if word and word.get("token") != self._heard:
                self._heard = word.get("token")
                self._voice.say(main=self._heard)
            if time.monotonic() > last:
                raise InputError(f"{self.folder}: the main process has not come within {MEETING:g} seconds")
            time.sleep(LOOK)

    def _look(self) -> dict:
        """What the main process says; nothing where it has gone.

        Raises:
            InputError: it has stopped, or the folder is another launch's by now.
        """
        word = self._main.word()
        if word and word.get("token") != self._heard:
            raise InputError(f"{self.folder}: another launch goes on with this run")
        if "failed" in word:
            raise AlreadySaid(word["failed"])
        self._main.check_alive(self._place.named(0))
        return word

    def _hear(self, key: str, count: int) -> dict:
        """What the main process says, once it says ``key``; nothing where it has gone and left all ``count`` lines."""
        while key not in (word := self._look()):
            if not word and sum(1 for _ in scored_lines(self.scores)) == count:
                break
            time.sleep(LOOK)
        return word

    @property
    def rows(self) -> list[dict]:
        """The lines, of all processes."""
        return read_lines(self.scores)[0]

    def lacks(self, count: int) -> bool:
        """Whether lines are missing, as the main process says."""
        word = self._hear("starts", count)
        if word.get("batch_size_used"):
            self.record["batch_size_used"] = word["batch_size_used"]
        return bool(word)

    def batches(self, count: int, size: int, unit: str = "prompt") -> Iterator[range]:
        """As :meth:`Store.batches`, of this process's share; ends when the main process has put all lines in order."""
        if self._part is None:
            word = self._hear("starts", count)
            self._take_share(self._place, self._voice.path.with_suffix(".jsonl"), word["starts"], word["size"], count)
        yield from self._make(size)
        self._voice.say(done=True)
        self._hear("", count)
