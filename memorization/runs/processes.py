"""One run made by several processes, on any machines that share its folder. See docs/many-gpus.md.

Each process makes every k-th of the batches that are missing into a part, a file of its own; the main process puts the
lines of all parts in order. Parts lie in ``<run>/scores.parts/``, and beside them what the processes say to each other.
"""

from __future__ import annotations

import hashlib
import heapq
import json
import shutil
import time
from collections import deque
from collections.abc import Iterator, Sequence
from operator import itemgetter
from pathlib import Path
from secrets import token_hex

from tqdm import tqdm

from memorization.errors import InputError
from memorization.io.files import LineFile, scored_lines, whole_lines
from memorization.launch import Launch, check_launch
from memorization.runs import signs
from memorization.runs.signs import Peer, Sign
from memorization.runs.store import MemoryStore, ResultStore, Store, differences

BUSY = "a process of another launch is still writing to it; wait for it, or end it"


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
    several = {"processes": place.count} if place.count > 1 else {}
    return MainStore(place, folder, settings, {**info, **several}, overwrite, name)


def digits(settings: dict) -> str:
    """What parts that were made with these settings have at the end of their names."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]


class SharingStore(Store):
    """What the stores of all processes have in common: each looks at others, and makes a share of the batches."""

    _folder: Path  # of the parts
    _place: Launch
    _token: str  # of the launch
    _sign: Sign | None = None
    _peers: Sequence[Peer] = ()
    _share: deque[range] | None = None  # what is left of it
    _part: LineFile  # of the share

    def _file(self, rank: int, ending: str) -> Path:
        return self._folder / f"{rank:04d}-of-{self._place.count:04d}-{self._token}.{ending}"

    def _look(self) -> list[dict]:
        """What the others say, none of which has stopped."""
        return [peer.look(self._token) for peer in self._peers]

    def _take_share(self, starts: list[int], size: int, count: int) -> None:
        """Of the batches of ``size`` lines that begin at ``starts``."""
        self._part = LineFile(self._file(self._place.rank, "jsonl"), BUSY)
        own = starts[self._place.rank :: self._place.count]
        self._share = deque(range(start, min(start + size, count)) for start in own)

    def _make(self, size: int) -> Iterator[range]:
        """What is left of the share, in pieces of ``size`` at most, which memory may have halved."""
        self._share = deque(batch[i : i + size] for batch in self._share or () for i in range(0, len(batch), size))
        looked = time.monotonic()
        while self._share:
            yield self._share[0]
            self._share.popleft()
            if time.monotonic() - looked > signs.BEAT:
                self._look()
                looked = time.monotonic()
        self._part.close()

    def add(self, rows: list[dict]) -> None:
        """As :meth:`Store.add`, to this process's part; what it makes before it has a share, to the whole."""
        if self._share is None:
            super().add(rows)
        else:
            self._part.append(rows)

    def __exit__(self, kind, error, trace) -> None:
        try:
            if self._share is not None:
                self._part.close()
            if self._sign:
                self._sign.end(error)
        finally:
            super().__exit__(kind, error, trace)


class MainStore(SharingStore, ResultStore):
    """The main process's, alone or of several: it says what is missing, makes its share, and puts all lines in order.

    What parts hold is taken, whichever launch left them.
    """

    shared = True

    def __init__(self, place: Launch, folder: Path, settings: dict, info: dict, overwrite: bool, name: str) -> None:
        self._place, self._folder, self._digits = place, (folder / name).with_suffix(".parts"), digits(settings)
        self._token = f"{token_hex(4)}-{self._digits}"
        super().__init__(folder, settings, info, overwrite, name)

    def _open(self, settings: dict, overwrite: bool) -> None:
        try:
            if self._place.count > 1:
                self._meet(settings)
            for part in self._folder.glob("*.jsonl"):
                LineFile(part, BUSY).close()
                if overwrite:
                    part.unlink()
            super()._open(settings, overwrite)
        except BaseException as error:
            if self._sign:
                self._sign.end(error)
            raise

    def _meet(self, settings: dict) -> None:
        """Wait until all others have answered, and see that they would score with the same settings."""
        ranks = range(1, self._place.count)
        self._peers = [Peer(self._file(rank, "json"), self._place, rank) for rank in ranks]
        self._sign = Sign(self._folder / "main.json", token=self._token)
        self._wait_for("settings", "processes")
        for peer, word in zip(self._peers, self._look(), strict=True):
            if what := differences(word["settings"], settings):
                raise InputError(f"{peer.who} has other settings than the main process ({what})")
        self._sign.say(met=True)

    def _wait_for(self, key: str, why: str) -> None:
        """Until each of the others has said ``key``."""
        with tqdm(total=len(self._peers), desc=why, unit="process", delay=2, leave=False) as bar:
            while away := sum(key not in word for word in self._look()):
                bar.update(len(self._peers) - away - bar.n)
                time.sleep(signs.LOOK)

    @property
    def anew(self) -> bool:
        """As :attr:`Store.anew`; what lies in parts counts."""
        return super().anew and not any(self._held())

    def _held(self) -> Iterator[dict]:
        """The lines of all parts by their numbers, some of them more than once."""
        parts = sorted(self._folder.glob(f"*-{self._digits}.jsonl"))
        return heapq.merge(*map(_numbered, parts), key=itemgetter("id"))

    def lacks(self, count: int) -> bool:
        """As :meth:`ResultStore.lacks`."""
        lacking = super().lacks(count)
        if not lacking:
            self._end_parts()
        return lacking

    def batches(self, count: int, size: int, unit: str = "prompt") -> Iterator[range]:
        """As :meth:`Store.batches`, of this process's share; ends when all have made theirs.

        Raises:
            InputError: another process has stopped.
        """
        if self._share is None:
            self._deal(count, size)
        yield from super().batches(count, size, unit)
        if self._share is not None:
            self._merge(count)
        self._end_parts()

    def _deal(self, count: int, size: int) -> None:
        """Say which batches are missing, as a whole or in part; unless no other process has made or makes any."""
        held = {row["id"] for row in self._held()}
        if not (self._peers or held):
            return
        missing = set(range(self.done, count)) - held
        starts = [numbers.start for numbers in self._grid(count, size) if not missing.isdisjoint(numbers)]
        self._take_share(starts, size, count)
        if self._sign:
            self._sign.say(starts=starts, size=size, batch_size_used=self.record.get("batch_size_used"))

    def _grid(self, count: int, size: int) -> Iterator[range]:
        return super()._grid(count, size) if self._share is None else self._make(size)

    def _made(self, count: int) -> int:
        """As :meth:`Store._made`, if the others are as fast as this process."""
        if self._share is None:
            return self.done
        return max(0, count - self._place.count * sum(map(len, self._share)))

    def _merge(self, count: int) -> None:
        """Wait until all are done, and put the lines of all parts in order."""
        self._wait_for("done", "until all are done")
        for row in self._held():
            if row["id"] == self.done < count:
                self.append([row])
        if self.done < count:
            raise InputError(f"{self.folder}: line {self.done} is in no part; give the same command again")

    def _end_parts(self) -> None:
        """All lines are in one file."""
        if self._folder.is_dir():
            self._lines.sync()
            shutil.rmtree(self._folder, ignore_errors=True)


def _numbered(part: Path) -> Iterator[dict]:
    for row in whole_lines(part, "start anew with --overwrite"):
        if type(row.get("id")) is not int:
            raise InputError(f"{part}: damaged: a line has no id; start anew with --overwrite")
        yield row


class HelpingStore(SharingStore):
    """Another process's: it makes its share of what the main process says is missing, and waits for the whole."""

    anew = False  # the main process has made everything ready
    _sign: Sign

    def __init__(self, place: Launch, folder: Path, settings: dict, name: str) -> None:
        self.folder, self.scores, self.name = folder, folder / name, folder.name
        self.record, self.done = {"settings": settings}, 0
        self._place, self._folder = place, self.scores.with_suffix(".parts")
        main, last = Peer(self._folder / "main.json", place, 0), time.monotonic() + signs.MEETING
        # One that has met all others before it heard of this process is another launch's.
        while not (word := main.word()) or word.keys() & {"met", "failed"}:
            if time.monotonic() > last:
                raise InputError(f"{folder}: the main process has not come within {signs.MEETING:g} seconds")
            time.sleep(signs.LOOK)
        self._token, self._peers = word["token"], [main]
        self._sign = Sign(self._file(place.rank, "json"), token=self._token, settings=settings)

    @property
    def rows(self) -> list[dict]:
        """The lines, of all processes."""
        return list(scored_lines(self.scores))

    def lacks(self, count: int) -> bool:
        """Whether lines are missing, as the main process says."""
        while "starts" not in (deal := self._look()[0]):
            if self._is_whole(count):
                return False
            time.sleep(signs.LOOK)
        if deal["batch_size_used"]:
            self.record["batch_size_used"] = deal["batch_size_used"]
        if self._share is None:
            self._take_share(deal["starts"], deal["size"], count)
        return True

    def _is_whole(self, count: int) -> bool:
        """Whether the main process has gone and left all lines."""
        return not any(self._look()) and sum(1 for _ in scored_lines(self.scores)) == count

    def batches(self, count: int, size: int, unit: str = "prompt") -> Iterator[range]:
        """As :meth:`Store.batches`, of this process's share; ends when the main process has put all lines in order."""
        yield from self._make(size)
        self._sign.say(done=True)
        while not self._is_whole(count):
            time.sleep(signs.LOOK)
