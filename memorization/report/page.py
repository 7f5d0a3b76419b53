"""A page: what it holds, and how it is written as one HTML file that asks nobody for anything."""

from __future__ import annotations

import base64
import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image

from memorization.errors import InputError, printable
from memorization.io.pictures import read_picture

LARGEST = 256  # pixels of a picture's side in a page


@dataclass(frozen=True)
class Picture:
    """A picture in the page itself, with what it shows in words."""

    data: str
    alt: str


@dataclass(frozen=True)
class Pair:
    """Pictures side by side, and what is to be said of them."""

    pictures: Sequence[Picture]
    text: str


@dataclass(frozen=True)
class Point:
    """A value with its interval, at a name."""

    name: str
    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Curve:
    """Shares at names in order, and a level to compare them with."""

    title: str
    points: Sequence[Point]
    level: float
    level_name: str

    def x(self, number: int) -> float:
        """Place of a point, in a drawing of 640 x 240."""
        return 60 + 540 * (number + 0.5) / len(self.points)

    def y(self, value: float) -> float:
        """Place of a value from 0 to 1."""
        return 200 - 180 * min(1.0, max(0.0, value))

    @property
    def words(self) -> str:
        """The curve, for who does not see it."""
        said = "; ".join(f"{p.name}: {p.value:.3f} (95% {p.low:.3f} to {p.high:.3f})" for p in self.points)
        return f"{self.title}. {said}. {self.level_name}: {self.level:.3f}."


@dataclass(frozen=True)
class Table:
    """Columns and rows of a table that can be sorted."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence]


@dataclass(frozen=True)
class Page:
    """A report.

    Attributes:
        summary: in words, sentence by sentence.
        method: name -> what was done, with which limits, versions and hashes.
        evidence: what it does not show.
    """

    title: str
    summary: Sequence[str]
    method: Sequence[tuple[str, str]]
    evidence: Sequence[str]
    curves: Sequence[Curve] = ()
    pairs: Sequence[Pair] = ()
    pairs_title: str = ""
    tables: Sequence[Table] = field(default_factory=tuple)


class Shown:
    """How prompts, files and pictures are shown: as they are, or by their hashes alone.

    Args:
        hashed: leave out pictures, prompts and the names of files, models and epochs.
    """

    def __init__(self, hashed: bool) -> None:
        self.hashed = hashed

    def text(self, text: str) -> str:
        """A prompt, or the name of a file or model."""
        if not self.hashed:
            return text
        return f"sha256:{hashlib.sha256(text.encode('utf-8', 'backslashreplace')).hexdigest()[:16]}"

    def file(self, name: str, sha256: str) -> str:
        """A file by its name, or by the hash of what it holds."""
        return f"sha256:{sha256[:16]}" if self.hashed else name

    def pair(self, pictures: Sequence[tuple[Path, str]], text: str) -> Pair | None:
        """Pictures side by side, those of files that can be read; None where hashes alone are shown."""
        if self.hashed:
            return None
        found = []
        for path, alt in pictures:
            try:
                found.append(Picture(inline(read_picture(path, None)), alt))
            except InputError:
                found.append(Picture("", f"{alt} (the file is not there any more)"))
        return Pair(found, text)


def inline(picture: np.ndarray) -> str:
    """uint8 ``(h, w, 3)`` as a data URL, no side longer than 256 pixels."""
    image = Image.fromarray(picture)
    image.thumbnail((LARGEST, LARGEST))
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return f"data:image/png;base64,{base64.b64encode(stream.getvalue()).decode()}"


def html(page: Page) -> str:
    """The page as HTML: everything in one file, no request, readable without scripts."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True, finalize=lambda cell: printable(cell) if type(cell) is str else cell,
    )  # fmt: skip
    return environment.get_template("page.html").render(page=page)
