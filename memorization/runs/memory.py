"""How much goes through a model at once: measured on a run's first lines, and halved on out of memory."""

from __future__ import annotations

import math
from collections.abc import Callable
from time import perf_counter
from typing import Protocol

import psutil
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from tqdm import tqdm

from memorization.errors import InputError
from memorization.launch import launched
from memorization.models.base import TextToImage
from memorization.runs.store import Store

TRIALS = 0.1  # of a run's seconds, that trying sizes may last
SLACK = 0.03  # a larger size has to be faster by more than this: it takes more memory
TOO_LARGE = "out of memory even with one row to a UNet call; try --dtype bfloat16, or --offload"


def default_batch_size(pipe: TextToImage) -> int:
    """Rows to a call of the denoiser to begin with: where sizes are tried, the first of them.

    CUDA starts high, since too much is halved; a CPU is best kept within its caches.
    """
    if pipe.device.type == "cuda":
        return 64
    pixels = pipe.pure_noise(1, 0)[0, 0].numel()
    return min(32, max(8, 8192 // pixels))


def with_memory(work: Callable[[int], None], store: Store, batch_size: int) -> None:
    """``work(batch_size)``, again with half of it on out of memory, which is noted in the store for a resumed run.

    Raises:
        InputError: not even one row fits.
    """
    batch_size = store.record.get("batch_size_used", batch_size)
    while True:
        try:
            return work(batch_size)
        except RuntimeError as error:
            if not should_reduce_batch_size(error):
                raise
        if batch_size == 1:
            raise InputError(TOO_LARGE)
        batch_size //= 2
        store.record["batch_size_used"] = batch_size
        store.save("running")
        clear_device_cache(garbage_collection=True)


class Lines(Protocol):
    """What makes a run's lines into its store, with any batch size."""

    def at_once(self, size: int) -> int:
        """Lines to a batch of ``size`` rows to a UNet call."""
        ...

    def make(self, numbers: range, size: int) -> None:
        """Make the lines of these numbers, which are the next ones."""
        ...


def measure_batch_size(lines: Lines, store: Store, count: int, first: int) -> None:
    """Find the size at which lines are made fastest, by making the first ones of a run with a few; all of them count.

    ``first`` and its double are tried, and more while all trials last at most a tenth of the run; nothing is tried
    where the list is too short for two. What was found is noted in the store, so that a resumed run does not measure
    again; of several processes the main one does it for all, before it deals out what is left.

    Args:
        count: of the list's lines.

    Raises:
        InputError: not even one row fits into memory.
    """
    trials = _Trials(lines, store, count, first)
    with tqdm(total=count, initial=store.done, desc="trying batch sizes", unit="line", leave=False, delay=1) as bar:
        trials.make(bar)
    best = trials.search.best
    if trials.search.pace:
        # The batches that follow lie on a grid: a short one leads to its next line.
        with_memory(lambda size: _make_to_grid(lines, store, count, size), store, best)
        store.record["batch_sizes_tried"] = {str(size): float(f"{s:.4g}") for size, s in trials.search.pace.items()}
    store.record.setdefault("batch_size_used", best)
    store.save("running")


def _make_to_grid(lines: Lines, store: Store, count: int, size: int) -> None:
    at_once = lines.at_once(size)
    stop = min(count, -(-store.done // at_once) * at_once)
    if store.done < stop:
        lines.make(range(store.done, stop), size)


class Search:
    """Which size to try next: doubled as long as that is faster, else halved as long as that is.

    Attributes:
        pace: size -> seconds a line.
    """

    def __init__(self, first: int) -> None:
        self.pace: dict[int, float] = {}
        self._first, self._limit = first, math.inf

    @property
    def best(self) -> int:
        """The smallest of those that are nearly the fastest; the first, where none was tried."""
        fastest = min(self.pace.values(), default=0)
        return min((size for size, pace in self.pace.items() if pace <= (1 + SLACK) * fastest), default=self._first)

    def next(self) -> int | None:
        """The size to try; None where there is none left."""
        sizes = (2 * self.best, self.best // 2) if self.pace else (self._first,)
        return next((size for size in sizes if 0 < size < self._limit and size not in self.pace), None)

    def too_large(self, size: int) -> None:
        """Neither this size fits into memory nor a larger one.

        Raises:
            InputError: nor does any smaller one.
        """
        if size == 1:
            raise InputError(TOO_LARGE)
        self._limit, self._first = size, size // 2
        self.pace.pop(size, None)  # its first batch fitted


class _Trials:
    """The batches by which sizes are measured, on the next lines of a run."""

    def __init__(self, lines: Lines, store: Store, count: int, first: int) -> None:
        self.lines, self.store, self.search = lines, store, Search(first)
        self._count, self._whole, self._spent = count, count - store.done, 0.0

    @property
    def _left(self) -> int:
        return self._count - self.store.done

    def make(self, bar: tqdm) -> None:
        """Try sizes, until there is none left or time is up."""
        while size := self.search.next():
            try:
                if not self._worth(size):
                    return
                self._try(size)
            except RuntimeError as error:
                if not should_reduce_batch_size(error):
                    raise
                self.search.too_large(size)
                clear_device_cache(garbage_collection=True)
            bar.update(self.store.done - bar.n)

    def _worth(self, size: int) -> bool:
        """Whether there are lines, time and memory for a size."""
        tried, at_once, processes = self.search.pace, self.lines.at_once(size), launched().count
        if not tried:
            share = 1 if processes == 1 else TRIALS / processes  # the others wait meanwhile
            return at_once + self.lines.at_once(2 * size) <= share * self._left
        if size > max(tried) and not _has_room():
            return False
        return at_once <= self._left and (len(tried) < 2 or self._in_time(at_once))

    def _in_time(self, more: int) -> bool:
        """Whether ``more`` lines, at the best pace so far, end within the trials' share of the run."""
        pace = min(self.search.pace.values())
        return self._spent + pace * more <= TRIALS * pace * self._whole / launched().count

    def _try(self, size: int) -> None:
        """A batch, and a second one where there is time: the first of its size prepares what others find ready."""
        pace, at_once = self.search.pace, self.lines.at_once(size)
        for batch in range(2):
            if batch and not (at_once <= self._left and self._in_time(at_once)):
                return
            started = perf_counter()
            self.lines.make(range(self.store.done, self.store.done + at_once), size)
            took = perf_counter() - started
            self._spent += took
            pace[size] = min(pace.get(size, math.inf), took / at_once)


def _has_room() -> bool:
    """Whether as much memory is free as this process holds. A system that runs out of it ends the process unasked."""
    return psutil.virtual_memory().available >= psutil.Process().memory_info().rss
