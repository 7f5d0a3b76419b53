"""The states of a fine-tune: LoRA files and checkpoints, in the order in which a trainer saved them."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path

from local_sd_pipeline import LocalStableDiffusionPipeline
from memorization.errors import InputError, printable
from memorization.io.files import sha256_of
from memorization.models.checkpoint import identity_of
from memorization.models.loading import Model, load_pipeline
from memorization.models.lora import header_of, holds_lora, wearing, without_adapter
from memorization.models.spec import ModelSpec

STEPS = ("ss_steps", "step", "global_step")  # how trainers call the step that they note
LAST = (2, 0, "")  # in the order of names, after numbers and words
PARTS = ("unet", "text_encoder", "tokenizer", "scheduler", "vae")


@dataclass(frozen=True)
class Adapter:
    """One state.

    Attributes:
        name: for people: its file's, and its folder's where files are alike.
        step: that its trainer noted; None where it did not.
        whole: a checkpoint instead of a LoRA.
        revision: the sha256 of what it holds.
    """

    name: str
    path: Path
    step: int | None
    whole: bool
    revision: str


def find_adapters(places: Iterable[Path]) -> list[Adapter]:
    """The states that files and folders hold, earliest first: by the step that is noted in them, else by name.

    A trainer's last file often has no number, or lies beside the folders of the earlier ones; it comes last. Files of a
    folder that hold no LoRA (an optimizer's state, embeddings, a VAE) are left out, with a line on standard error.

    Raises:
        InputError: one is no adapter or checkpoint, or two are of the same step.
    """
    files = list(dict.fromkeys(path for place in places for path in _states(place)))
    names = _names(files)
    found = [_read(path, name) for path, name in zip(files, names, strict=True)]
    noted = all(adapter.step is not None for adapter in found)
    home = None if _are_unlike(map(_stem, files)) else os.path.commonpath([file.absolute().parent for file in files])
    ordered = sorted(found, key=lambda adapter: ((0, adapter.step, ""),) if noted else _order(adapter.path, home))
    for one, other in pairwise(ordered):
        if noted and one.step == other.step:
            raise InputError(f"{one.path} and {other.path}: both say that they are of step {one.step}; the order of "
                             "epochs cannot be told")  # fmt: skip
    return ordered


def _states(place: Path) -> list[Path]:
    """The LoRA files and checkpoints at a place."""
    if not place.is_dir():
        return [place]
    if (place / "model_index.json").is_file():
        return [place]
    files = sorted([*place.glob("*.safetensors"), *place.glob("*/*.safetensors")])
    inside = [path.parent for path in sorted(place.glob("*/model_index.json"))] + [*filter(_is_lora, files)]
    if not inside:
        raise InputError(f"{place}: holds no adapter (a LoRA in .safetensors) and no checkpoint (model_index.json)")
    return inside


def _is_lora(path: Path) -> bool:
    found = holds_lora(path)
    if not found:
        _say_left_out(path)
    return found


@cache  # once, however often a folder is looked at
def _say_left_out(path: Path) -> None:
    print(printable(f"{path}: left out, it holds no LoRA"), file=sys.stderr)


def _names(files: list[Path]) -> list[str]:
    """Stems; with the folder's name before them, or whole paths, where some are alike."""
    ways = (_stem, lambda path: f"{path.absolute().parent.name}/{path.stem}", str)
    return next(names for way in ways if _are_unlike(names := [way(path) for path in files]))


def _stem(path: Path) -> str:
    return path.name if path.is_dir() else path.stem


def _are_unlike(names: Iterable[str]) -> bool:
    listed = list(names)
    return len(set(listed)) == len(listed)


def _order(path: Path, home: str | None) -> tuple:
    """By name; where names are alike, by the folders in ``home``, and what lies beside folders of others comes after
    them."""
    if home is None:
        return _natural(_stem(path))
    folders = path.absolute().relative_to(home).parts[:-1]
    return (*map(_natural, folders), (LAST,), _natural(_stem(path)))


def _natural(name: str) -> tuple:
    """Numbers by value; a name that ends where another has a number comes after it."""
    parts = [part for part in re.split(r"(\d+)", name) if part]
    return (*((0, int(part), "") if part.isdigit() else (1, 0, part.strip("-_. ")) for part in parts), LAST)


def _read(path: Path, name: str) -> Adapter:
    if path.is_dir():
        parts = [part for part in PARTS if (path / part).is_dir()]
        return Adapter(name, path, None, True, _joined(identity_of(path, parts)))
    _, noted = header_of(path)
    steps = [int(noted[key]) for key in STEPS if noted.get(key, "").isdigit()]
    return Adapter(name, path, steps[0] if steps else None, False, f"sha256:{sha256_of(path)}")


def _joined(identity: dict[str, str]) -> str:
    return " ".join(f"{part}={digest.removeprefix('sha256:')[:16]}" for part, digest in identity.items())


class Tuned:
    """A base model under one of its adapters, or alone.

    Attributes:
        pipe: the pipeline as it is now.
    """

    def __init__(self, base: Model) -> None:
        self.base, self.pipe = base, base.pipe
        self._alone = nullcontext

    @contextmanager
    def using(self, adapter: Adapter | None) -> Iterator[None]:
        """The model under an adapter, for as long as the block lasts; None for the base.

        Raises:
            InputError: it does not fit the base.
        """
        if adapter is None:
            yield
        elif adapter.whole:
            self.pipe = self._load(adapter)
            try:
                yield
            finally:
                self.pipe = self.base.pipe
        else:
            with wearing(self.pipe, adapter.path):
                self._alone = lambda: without_adapter(self.pipe)
                try:
                    yield
                finally:
                    self._alone = nullcontext

    @contextmanager
    def alone(self) -> Iterator[LocalStableDiffusionPipeline]:
        """Within :meth:`using`: the base."""
        with self._alone():
            yield self.base.pipe

    def _load(self, adapter: Adapter) -> LocalStableDiffusionPipeline:
        spec = ModelSpec(adapter.name, (str(adapter.path),))
        pipe = load_pipeline(spec, self.base.dtype, self.base.pipe.device, pictures=True)
        if pipe.pure_noise(1, 0).shape != self.base.pipe.pure_noise(1, 0).shape:
            raise InputError(f"{adapter.path}: makes latents of another size than the base; it is no fine-tune of it")
        return pipe
