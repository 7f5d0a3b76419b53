"""One run made by several processes, on any machines that share its folder. See docs/many-gpus.md.

Each process makes every k-th of the batches that are missing and writes its lines to a file of its own; the main
process puts them in order. They need no process group: they tell each other by files in ``<run>/scores.parts/`` what
there is to tell. ``main.json`` is the main process's, ``0001-of-0004-<token>.json`` another's, beside its lines.
"""

from __future__ import annotations

import heapq
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import pairwise
from operator import itemgetter
from pathlib import Path
from secrets import token_hex

from tqdm import tqdm

from memorization.errors import AlreadySaid, InputError, printable
from memorization.io.files import LineFile, parse_object, read_lines, whole_lines, write_atomically, writing
from memorization.launch import launched
from memorization.runs.store import MemoryStore, ResultStore, Store, differences

# Seconds. Network file systems may show a file's change to other machines a minute late.
BEAT = 5.0  # between two signs of life
SILENCE = 180.0  # without one, after which a process counts as dead
MEETING = 900.0  # until all processes have loaded the model
LEAVING = 30.0  # until all have heard that the run is whole
LOOK = 0.5  # between two looks at what others say


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
    place = launched()
    if folder is None:
        return MemoryStore(settings)
    if not place.main:
        return HelpingStore(folder, settings, name)
    if place.count == 1:
        return GatheringStore(folder, settings, info, overwrite, name)
    return LeadingStore(folder, settings, {**info, "processes": place.count}, overwrite, name)


class Voice:
    """A file by which a process tells the others how far it is; its time changes while the process lives.

    Attributes:
        token: of this process, unlike all others'.
    """

    def __init__(self, path: Path, **word: object) -> None:
        self.path, self.token, self.word, self._silent = path, token_hex(4), word, threading.Event()
        with writing(path.parent):
            path.parent.mkdir(parents=True, exist_ok=True)
        self.say(token=self.token)
        threading.Thread(target=self._beat, daemon=True).start()

    def say(self, **word: object) -> None:
        """Say something more."""
        self.word |= word
        write_atomically(self.path, json.dumps(self.word))

    def _beat(self) -> None:
        while not self._silent.wait(BEAT):
            with suppress(OSError):
                os.utime(self.path)

    def end(self, error: BaseException | None) -> None:
        """Fall silent; of an error say why, if that can be written."""
        self._silent.set()
        if error:
            why = str(error) if isinstance(error, InputError) else f"{type(error).__name__} {error}".strip()
            with suppress(InputError):
                self.say(failed=why)


class Ear:
    """What another process says, by its file."""

    def __init__(self, path: Path) -> None:
        self.path, self._word, self._since = path, {}, time.monotonic()
        self._seen: int | None = None

    def word(self) -> dict:
        """All that it has said, as far as is known: a file that was just replaced may be out of reach for a moment."""
        with suppress(OSError):
            self._word = parse_object(self.path.read_bytes()) or self._word
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
            raise InputError(f"{who} has given no sign of life for {SILENCE:g} seconds; give the same command again, "
                             "with any number of processes: it goes on with what is there")  # fmt: skip


class Others:
    """The other processes, as the main one sees them."""

    def __init__(self, folder: Path) -> None:
        self.place, self.folder, self.voice = launched(), folder, Voice(folder / "main.json")
        self._ears: dict[int, Ear] = {}

    def meet(self, settings: dict) -> None:
        """Wait until all are there.

        Raises:
            InputError: one does not come, or would score with other ``settings``.
        """
        last, ranks = time.monotonic() + MEETING, range(1, self.place.count)
        with tqdm(total=len(ranks), desc="processes", unit="process", delay=2, leave=False) as bar:
            while len(self._ears) < len(ranks):
                for rank in ranks:
                    if rank not in self._ears and (ear := self._find(rank)):
                        self._ears[rank] = ear
                        bar.update()
                if time.monotonic() > last:
                    away = next(rank for rank in ranks if rank not in self._ears)
                    raise InputError(f"{self.place.named(away)} has not come within {MEETING:g} seconds")
                time.sleep(LOOK)
        words = {rank: ear.word() for rank, ear in self._ears.items()}
        self.voice.say(others={str(rank): word["token"] for rank, word in words.items()})
        for rank, word in words.items():
            if what := differences(word["settings"], settings):
                raise InputError(f"{self.place.named(rank)} has other settings than the main process ({what})")

    def _find(self, rank: int) -> Ear | None:
        """The process of that rank that has heard this main process; those of earlier launches have not."""
        ears = map(Ear, self.folder.glob(f"{rank:04d}-of-*.json"))
        return next((ear for ear in ears if ear.word().get("main") == self.voice.token), None)

    @property
    def made(self) -> int:
        """How many lines they have made."""
        return sum(ear.word().get("made", 0) for ear in self._ears.values())

    def wait(self, show: Callable[[], None]) -> None:
        """Wait until all have made their share.

        Raises:
            InputError: one has stopped.
        """
        while working := {rank: ear for rank, ear in self._ears.items() if not ear.word().get("done")}:
            for rank, ear in working.items():
                if why := ear.word().get("failed"):
                    raise InputError(f"{self.place.named(rank)}: {why}")
                ear.check_alive(self.place.named(rank))
            show()
            time.sleep(LOOK)
        show()

    def part(self) -> None:
        """Tell them that the run is whole, and wait for them to go."""
        self.voice.say(whole=True)
        last = time.monotonic() + LEAVING
        while any(ear.path.exists() for ear in self._ears.values()) and time.monotonic() < last:
            time.sleep(LOOK / 5)


class Share:
    """A process's batches, and the file that its lines go to.

    Args:
        path: of that file.
        missing: ranges of lines, as ``[first, stop]``, that all processes are to make.
        size: of a batch.
        count: of all lines.

    Attributes:
        made: how many lines it has made.
    """

    def __init__(self, path: Path, missing: Iterable[Sequence[int]], size: int, count: int) -> None:
        place = launched()
        self._missing = {number for first, stop in missing for number in range(first, stop)}
        starts = sorted({number // size * size for number in self._missing})[place.rank :: place.count]
        self._batches = [range(start, min(start + size, count)) for start in starts]
        self._lines, self.made = LineFile(path, BUSY), 0

    def left(self, size: int) -> Iterator[range]:
        """The batches that are still to be made, in pieces of ``size`` at most, which memory may have halved."""
        for batch in self._batches:
            for start in range(batch.start, batch.stop, size):
                numbers = range(start, min(start + size, batch.stop))
                if not self._missing.isdisjoint(numbers):
                    yield numbers

    def add(self, rows: list[dict]) -> None:
        """Keep those lines of a batch that are missing."""
        rows = [row for row in rows if row["id"] in self._missing]
        self._lines.append(rows)
        self._missing.difference_update(row["id"] for row in rows)
        self.made += len(rows)

    def close(self) -> None:
        """Let go of the file."""
        self._lines.close()


BUSY = "a process of another launch is still writing to it; wait for it, or end it"


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
        for part in self._parts():
            LineFile(part, BUSY).close()
            if overwrite:
                part.unlink()
        super()._open(settings, overwrite)

    def _has_lines(self) -> bool:
        return super()._has_lines() or bool(self._parts())

    @property
    def anew(self) -> bool:
        """As :attr:`Store.anew`; what lies in parts counts."""
        return super().anew and not self._parts()

    def _parts(self) -> list[Path]:
        return sorted(parts_of(self.scores).glob("*.jsonl"))

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


class LeadingStore(GatheringStore):
    """The main process's: it says what is missing, makes its own share, and puts all lines in order."""

    _share: Share | None = None
    _asked = 0  # how many lines all processes are to make

    def _open(self, settings: dict, overwrite: bool) -> None:
        self._others = Others(parts_of(self.scores))
        try:
            self._others.meet(settings)
            super()._open(settings, overwrite)
        except BaseException as error:
            self._others.voice.end(error)
            raise

    def batches(self, count: int, size: int, unit: str = "prompt") -> Iterator[range]:
        """As :meth:`Store.batches`, of this process's share; ends when all have made theirs.

        Raises:
            InputError: another process has stopped.
        """
        share = self._share = self._share or self._deal(count, size)
        with tqdm(total=count, initial=count - self._asked, desc=printable(self.name), unit=unit, smoothing=0) as bar:

            def show() -> None:
                bar.update(count - self._asked + share.made + self._others.made - bar.n)

            due = _due()
            for numbers in share.left(size):
                yield numbers
                if due():
                    show()
            share.close()
            self._others.wait(show)
        self._take(Held(self._parts()), count)
        if self.done < count:
            raise InputError(f"{self.folder}: line {self.done} is in no part; give the same command again")
        self._end_parts()

    def _deal(self, count: int, size: int) -> Share:
        """Say what is missing; this process's share of it."""
        held = Held(self._parts())
        missing = [number for number in range(self.done, count) if held.line(number) is None]
        self._asked, ranges = len(missing), _ranges(missing)
        share = Share(parts_of(self.scores) / f"{_stem(self._others.voice.token)}.jsonl", ranges, size, count)
        self._others.voice.say(missing=ranges, size=size, batch_size_used=self.record.get("batch_size_used"))
        return share

    def add(self, rows: list[dict]) -> None:
        """As :meth:`Store.add`, to this process's part; what it makes before it has dealt, to the whole."""
        if self._share:
            self._share.add(rows)
        else:
            super().add(rows)

    def _end_parts(self) -> None:
        self._lines.sync()
        self._others.part()
        super()._end_parts()

    def __exit__(self, kind, error, trace) -> None:
        try:
            if self._share:
                self._share.close()
            self._others.voice.end(error)
        finally:
            super().__exit__(kind, error, trace)


class HelpingStore(Store):
    """Another process's: it makes its share of what the main process says is missing, and waits for the whole."""

    _share: Share | None = None

    def __init__(self, folder: Path, settings: dict, name: str) -> None:
        self.folder, self.scores, self.name = folder, folder / name, folder.name
        self.record, self.done = {"settings": settings}, 0
        self._place, parts = launched(), parts_of(self.scores)
        self._main = Ear(parts / "main.json")
        self._voice = Voice(parts / f"{_stem(token_hex(4))}.json", settings=settings)
        try:
            self._meet()
        except BaseException as error:
            self._voice.end(error)
            raise

    def _meet(self) -> None:
        """Wait until the main process has seen this one."""
        last = time.monotonic() + MEETING
        while (word := self._main.word()).get("others", {}).get(str(self._place.rank)) != self._voice.token:
            if "token" in word and word["token"] != self._voice.word.get("main"):
                self._voice.say(main=word["token"])
            if time.monotonic() > last:
                raise InputError(f"{self.folder}: the main process has not come within {MEETING:g} seconds")
            time.sleep(LOOK)

    def _hear(self, *keys: str) -> dict:
        """What the main process has said, once it has said one of ``keys``.

        Raises:
            InputError: it has stopped, or the folder is another launch's by now.
        """
        while (word := self._main.word())["token"] == self._voice.word["main"]:
            if {*keys} & {*word}:
                return word
            if "failed" in word:
                raise AlreadySaid(word["failed"])
            self._main.check_alive(self._place.named(0))
            time.sleep(LOOK)
        raise InputError(f"{self.folder}: another launch goes on with this run")

    @property
    def anew(self) -> bool:
        """Never: the main process has made everything ready."""
        return False

    @property
    def rows(self) -> list[dict]:
        """The lines, of all processes."""
        return read_lines(self.scores)[0]

    def lacks(self, count: int) -> bool:
        """Whether lines are missing, as the main process says."""
        word = self._hear("missing", "whole")
        if word.get("batch_size_used"):
            self.record["batch_size_used"] = word["batch_size_used"]
        return "missing" in word

    def batches(self, count: int, size: int, unit: str = "prompt") -> Iterator[range]:
        """As :meth:`Store.batches`, of this process's share; ends when the main process has put all lines in order."""
        if self._share is None:
            word = self._hear("missing")
            self._share = Share(self._voice.path.with_suffix(".jsonl"), word["missing"], word["size"], count)
        due = _due()
        for numbers in self._share.left(size):
            yield numbers
            if due():
                self._voice.say(made=self._share.made)
        self._share.close()
        self._voice.say(made=self._share.made, done=True)
        self._hear("whole")

    def add(self, rows: list[dict]) -> None:
        """As :meth:`Store.add`, to this process's part."""
        if self._share:
            self._share.add(rows)

    def __exit__(self, kind, error, trace) -> None:
        if self._share:
            self._share.close()
        self._voice.end(error)
        if error is None:
            self._voice.path.unlink(missing_ok=True)


def _due() -> Callable[[], bool]:
    """Whether it is time to look or to say something again: batches may be faster than a file system."""
    last = time.monotonic()

    def due() -> bool:
        nonlocal last
        if time.monotonic() - last < LOOK:
            return False
        last = time.monotonic()
        return True

    return due


def parts_of(scores: Path) -> Path:
    """The folder in which the processes of a launch leave what they have made and have to say."""
    return scores.with_suffix(".parts")


def _stem(token: str) -> str:
    """What a process's files are called."""
    place = launched()
    return f"{place.rank:04d}-of-{place.count:04d}-{token}"


def _ranges(numbers: Sequence[int]) -> list[list[int]]:
    """Rising numbers as ``[first, stop]`` of the runs that they are made of."""
    if not numbers:
        return []
    gaps = [(left, right) for left, right in pairwise(numbers) if right != left + 1]
    firsts, lasts = [numbers[0], *(right for _, right in gaps)], [*(left for left, _ in gaps), numbers[-1]]
    return [[first, last + 1] for first, last in zip(firsts, lasts, strict=True)]
