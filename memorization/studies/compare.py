"""The engine of every comparison of mitigations: the same prompts and noises under each row, a picture measured once.

A **row** is one way to make pictures: a method with its settings and a strength, or plain sampling. An **item** is what
pictures are made of: a prompt on some noises, or a picture of a model without prompts. The folder holds a line an item
of each row in ``scores.jsonl``, with a value a picture under each of the judge's measures, and the pictures as
``<row>/<item>-<noise>.png``. A killed comparison goes on where it stopped, and rows may be added to a finished one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from memorization.errors import InputError
from memorization.io.files import writing
from memorization.io.pictures import read_picture, save_picture, to_tensor
from memorization.mitigations.base import Mitigation
from memorization.paths import safe_name
from memorization.runs.attack import Attack
from memorization.runs.store import ResultStore
from memorization.similarity.frechet import Reference

PLAIN = "none"  # the row without a mitigation, which every comparison has first


class Row(NamedTuple):
    """One way to make pictures.

    Attributes:
        name: its own, of its line in the table and its folder.
        method: rows of one method, from mild to strong, are a line of the trade-off curve.
        mitigation: None for plain sampling.
        revision: of the checkpoint, where it is not the comparison's.
        attack: on its embeddings; such a row is a column of the row ``base`` in the table, and on no curve.
        base: the name of the row that is attacked.
    """

    name: str
    method: str
    mitigation: Mitigation | None = None
    revision: Mapping[str, str] | None = None
    attack: Attack | None = None
    base: str | None = None

    @property
    def strength(self) -> float | None:
        """Of the mitigation."""
        return self.mitigation.strength if self.mitigation else None

    def record(self) -> dict:
        """Everything that sets its pictures apart from other rows'."""
        settings = self.mitigation and self.mitigation.record()
        further = {"revision": self.revision, "attack": self.attack and vars(self.attack), "base": self.base}
        return {"method": self.method, "settings": settings} | {key: value for key, value in further.items() if value}

    def attacked(self, attack: Attack) -> Row:
        """The same, attacked."""
        return self._replace(name=attacked_name(self.name), attack=attack, base=self.name)


def attacked_name(row: str) -> str:
    """The name of a row's attacked one."""
    return f"{row}, attacked"


class Item(NamedTuple):
    """What pictures are made of.

    Attributes:
        prompt: None where the model takes none.
        label: 1 where copies are expected, 0 where a mitigation has nothing to do.
        family: near-copies share it; intervals resample families.
        image: the prompt's training picture, where it is known.
    """

    prompt: str | None
    label: int
    family: str
    image: Path | None = None


class Made(NamedTuple):
    """Pictures of an item, uint8 ``(noises, h, w, 3)``, and its line: the judge's values and what else is known."""

    pictures: np.ndarray
    line: dict


class Batch(NamedTuple):
    """Items whose pictures are made together."""

    items: Sequence[Item]
    make: Callable[[], Sequence[Made]]


class Comparison:
    """The rows of a comparison in the folder of ``store``.

    Args:
        limits: measure of nearness -> the value at which its table counts copies.
        reference: of the Frechet distance of each row's pictures of items with label 1; None to leave it out.
    """

    def __init__(self, store: ResultStore, limits: Mapping[str, float], reference: Reference | None = None) -> None:
        self.store, self.reference = store, reference
        self.rows: dict[str, dict] = store.record.setdefault("rows", {})
        self._note(store.record, "copy_limits", dict(limits))

    def lines(self, row: str) -> list[dict]:
        """Those of a row, in the order of its items."""
        own = [line for line in self.store.rows if line["row"] == row]
        return sorted(own, key=lambda line: line["item"])

    def fill(self, row: Row, batches: Sequence[Batch]) -> None:
        """Make, measure and keep what is missing of ``row``. Plain sampling comes first.

        Raises:
            InputError: the folder holds a row of this name with other settings, or a number was not finite.
        """
        self._register(row)
        have, first, missing = {line["item"] for line in self.lines(row.name)}, 0, []
        for batch in batches:
            numbers = range(first, first := first + len(batch.items))
            if not have.issuperset(numbers):
                missing.append((numbers, batch))
        for numbers, batch in tqdm(missing, desc=row.name, unit="batch", disable=not missing):
            self._add(row, numbers, batch, have)
        if self.reference and "frechet" not in self.rows[row.name]:
            items = [line["item"] for line in self.lines(row.name) if line["label"] == 1]
            pictures = np.concatenate([self.pictures(row.name, item) for item in items])
            if len(pictures) > 1:  # one has no spread
                self._note(self.rows[row.name], "frechet", round(self.reference.distance(pictures), 4))

    def _register(self, row: Row) -> None:
        """Write down what the row is, or see that it is what was written."""
        wanted, known = json.loads(json.dumps(row.record())), self.rows.get(row.name)
        if known is None:
            self._note(self.rows, row.name, wanted)
        elif {key: known.get(key) for key in wanted} != wanted:
            raise InputError(f"{self.store.folder}: holds a row {row.name!r} of other settings; choose another --out")

    def _note(self, where: dict, key: str, value: object) -> None:
        """Put something into ``run.json`` at once, so that no line is without it; a finished run is left as it is."""
        if where.get(key) != value:
            where[key] = value
            self._start()
            self.store.save("running")

    def _start(self) -> None:
        if not self.store.started:
            self.store.start()

    def _add(self, row: Row, numbers: range, batch: Batch, have: set[int]) -> None:
        """Make a batch; keep the pictures first, so that a line always has its own."""
        self._start()
        try:
            made = batch.make()
        except FloatingPointError as error:
            raise InputError(f"{row.name}: {error}; try --dtype float32") from None
        lines = []
        for number, item, one in zip(numbers, batch.items, made, strict=True):
            self._save(row.name, number, one.pictures)
            lines.append({
                "row": row.name, "method": row.method, "strength": row.strength, "item": number, "label": item.label,
                "family": item.family, "prompt": item.prompt, **({"base": row.base} if row.base else {}), **one.line,
                "moved": root_mean_square(one.pictures, self.pictures(PLAIN, number)),
            })  # fmt: skip
        missing = [line for line in lines if line["item"] not in have]
        self.store.append([{"id": self.store.done + i, **line} for i, line in enumerate(missing)])

    def _save(self, row: str, number: int, pictures: np.ndarray) -> None:
        folder = self.store.folder / safe_name(row)
        with writing(folder):
            folder.mkdir(exist_ok=True)
        for noise, picture in enumerate(pictures):
            save_picture(picture, self.path(row, number, noise))

    def path(self, row: str, number: int, noise: int) -> Path:
        """Of a picture."""
        return self.store.folder / safe_name(row) / f"{number:04d}-{noise}.png"

    def pictures(self, row: str, number: int) -> np.ndarray:
        """Of an item of a row, uint8 ``(noises, h, w, 3)``.

        Raises:
            InputError: its line is there, but they are not, as in a folder that was copied without them.
        """
        found = []
        while (path := self.path(row, number, len(found))).exists():
            found.append(read_picture(path, None))
        if not found:
            raise InputError(f"{path}: not there, though its line is; choose another --out")
        return np.stack(found)


def root_mean_square(left: np.ndarray, right: np.ndarray) -> float:
    """Mean over the pictures, uint8 ``(n, h, w, 3)``, of the root mean square difference of pixels, in [0, 2]."""
    return round((to_tensor(left) - to_tensor(right)).square().mean((1, 2, 3)).sqrt().mean().item(), 4)
