"""Pictures of the rows of a table, each made once and kept as ``<folder>/<row>/<number>.png``."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from memorization.errors import InputError
from memorization.io.files import read_lines
from memorization.io.pictures import read_picture
from memorization.paths import safe_name
from memorization.runs.store import ResultStore


class Gallery:
    """The pictures of a study. A batch counts as made once its line is in the store, so a killed study goes on."""

    def __init__(self, store: ResultStore) -> None:
        self.store = store

    def _made(self, row: str) -> list[dict]:
        return [line for line in read_lines(self.store.scores)[0] if line["row"] == row]

    def fill(self, row: str, batches: Sequence[tuple[int, Callable[[], np.ndarray]]]) -> None:
        """Make the batches of ``row`` that are not there.

        Args:
            batches: how many pictures each gives, and what makes them, uint8 ``(n, h, w, 3)``.

        Raises:
            InputError: those that are there were made in batches of other sizes, or a number was not finite.
        """
        sizes = [line["pictures"] for line in self._made(row)]
        if sizes != [size for size, _ in batches[: len(sizes)]]:
            raise InputError(f"{self.store.folder}: {row} was made in batches of other sizes; choose another --out")
        if len(sizes) == len(batches):
            return
        if not self.store.started:
            self.store.start()
        self._path(row, 0).parent.mkdir(exist_ok=True)
        first = sum(sizes)
        for size, make in tqdm(batches[len(sizes) :], desc=row, unit="batch", initial=len(sizes), total=len(batches)):
            started = time.perf_counter()
            try:
                pictures = make()
            except FloatingPointError as error:
                raise InputError(f"{row}: {error}; try --dtype float32") from None
            seconds = round(time.perf_counter() - started, 3)
            for number, picture in enumerate(pictures, first):
                Image.fromarray(picture).save(self._path(row, number))
            first += size
            self.store.append([{"id": self.store.done, "row": row, "pictures": size, "seconds": seconds}])

    def _path(self, row: str, number: int) -> Path:
        return self.store.folder / safe_name(row) / f"{number:05d}.png"

    def batches(self, row: str) -> Iterator[np.ndarray]:
        """The pictures of ``row``, a batch at a time."""
        first = 0
        for line in self._made(row):
            numbers = range(first, first + line["pictures"])
            yield np.stack([read_picture(self._path(row, number), None) for number in numbers])
            first = numbers.stop

    def seconds(self, row: str) -> float:
        """To make a picture of ``row``."""
        made = self._made(row)
        return sum(line["seconds"] for line in made) / sum(line["pictures"] for line in made)
