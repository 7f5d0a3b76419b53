"""Values of settings: what a dataclass's annotations say of them, checked in one place for flags, YAML and Python.

A field says by its annotation what it takes: ``bool``, ``int``, ``float`` (a finite one), ``str``, ``Path``,
``Literal``, a union of these, ``tuple[..., ...]`` or ``dict`` of them; ``Annotated[float, Bounds(...)]`` where not
every number makes sense. Text that means a number is one (``1e-3`` from a command line, or from YAML, which takes it
for text).
"""

from __future__ import annotations

import math
import reprlib
import types
from collections.abc import Mapping
from dataclasses import Field, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from memorization.errors import InputError

T = TypeVar("T")
NOTHING = ("none", "null", "")  # how text says that a value is missing


@dataclass(frozen=True)
class Bounds:
    """Where a number lies: from ``low`` to ``high``, ends included, or above ``low`` where it is ``open``."""

    low: float = -math.inf
    high: float = math.inf
    open: bool = False

    def __contains__(self, value: float) -> bool:
        return (self.low < value if self.open else self.low <= value) and value <= self.high

    def __str__(self) -> str:
        if self.high < math.inf:
            return f"{'above' if self.open else 'from'} {self.low:g} to {self.high:.12g}"
        return f"above {self.low:g}" if self.open else f"of at least {self.low:g}"


Positive = Annotated[float, Bounds(0, open=True)]
NotNegative = Annotated[float, Bounds(0)]
Share = Annotated[float, Bounds(0, 1, open=True)]
Rate = Annotated[float, Bounds(0, 0.999, open=True)]  # of false positives
Resamples = Annotated[int, Bounds(100)]  # of a bootstrap: with fewer its 95% interval means nothing
Count = Annotated[int, Bounds(1)]
Place = Annotated[int, Bounds(0)]
Timestep = Annotated[int, Bounds(0, 999)]
Steps = Annotated[int, Bounds(3, 500)]  # of a DDIM grid: detectors read its third last
Seed = Annotated[int, Bounds(0, 2**63 - 1)]


class Unfit(ValueError):
    """A value that is not what its annotation says."""


def fit(annotation: Any, value: Any) -> Any:
    """``value`` as the annotation has it.

    Raises:
        Unfit: it is something else.
    """
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        found = fit(arguments[0], value)
        if not all(found in bounds for bounds in arguments[1:]):
            raise Unfit
        return found
    if origin is Literal:
        return _chosen(arguments, value)
    if origin in (Union, types.UnionType):
        return _first_that_fits(arguments, value)
    if origin is tuple:
        return tuple(fit(arguments[0], item) for item in _instance(value, list, tuple))
    if origin is dict:
        pairs = _instance(value, dict).items()
        return {fit(arguments[0], key): fit(arguments[1], item) for key, item in pairs}
    return _plain(annotation, value)


def _plain(kind: Any, value: Any) -> Any:
    if kind is type(None):
        return _nothing(value)
    if kind is bool:
        return {"true": True, "false": False}[value] if value in ("true", "false") else _instance(value, bool)
    if kind in (int, float):
        return _number(kind, value)
    if kind is Path:
        return Path(_instance(value, str, Path))
    return value if kind is Any else _instance(value, kind)


def _instance(value: Any, *kinds: type) -> Any:
    if not isinstance(value, kinds):
        raise Unfit
    return value


def _nothing(value: Any) -> None:
    if value is not None and not (isinstance(value, str) and value.lower() in NOTHING):
        raise Unfit


def _chosen(options: tuple, value: Any) -> Any:
    for option in options:
        if type(value) is type(option) and value == option:
            return option
    raise Unfit


def _first_that_fits(annotations: tuple, value: Any) -> Any:
    # Text would fit whatever else is meant: it comes last.
    for annotation in sorted(annotations, key=lambda kind: kind is str):
        try:
            return fit(annotation, value)
        except Unfit:
            continue
    raise Unfit


def _number(kind: type, value: Any) -> float:
    if isinstance(value, str):
        try:
            value = int(value)
        except ValueError:
            try:
                value = float(value)
            except ValueError:
                raise Unfit from None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not is_finite(value):
        raise Unfit
    if kind is int:
        if value != int(value):
            raise Unfit
        return int(value)
    return value  # a whole number stays one, so that it is written as it was given


def is_finite(number: float) -> bool:
    """Whether it is neither NaN nor infinite, nor a whole number that no float holds."""
    try:
        return math.isfinite(number)
    except OverflowError:
        return False


def described(annotation: Any) -> str:
    """What an annotation takes, for people: ``number above 0``, ``one of exact, difference``."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return " ".join([described(arguments[0]), *map(str, arguments[1:])])
    if origin is Literal:
        return f"one of {', '.join(map(str, arguments))}" if len(arguments) > 1 else str(arguments[0])
    if origin in (Union, types.UnionType):
        return " or ".join("none" if kind is type(None) else described(kind) for kind in arguments)
    if origin in (tuple, dict):
        return {tuple: "list", dict: "table"}[origin]
    return {int: "whole number", float: "number", bool: "true or false", str: "word", Path: "path"}.get(
        annotation, getattr(annotation, "__name__", str(annotation))
    )


def value_of(annotation: Any, value: Any, what: str) -> Any:
    """``value`` as the annotation has it.

    Args:
        what: it is the value of, for the message.

    Raises:
        InputError: it is something else; one line that says what it should be.
    """
    try:
        return fit(annotation, value)
    except Unfit:
        meant = described(annotation)
        given = _brief(value)
        raise InputError(f"{what} = {given} is {'not' if meant.startswith('one of') else 'no'} {meant}") from None


def _brief(value: Any) -> str:
    """A value for a message, however large it is."""
    if not isinstance(value, str):
        value = reprlib.repr(value)
    return value if len(value) <= 80 else f"{value[:77]}..."


def annotations_of(cls: type) -> dict[str, Any]:
    """Annotation of each setting of a dataclass."""
    hints = get_type_hints(cls, include_extras=True)
    own: tuple[Field, ...] = fields(cls)  # ty: ignore[invalid-argument-type]
    return {field.name: hints[field.name] for field in own if field.init}


def fitted(cls: type, values: Mapping[str, Any], of: str) -> dict[str, Any]:
    """``values`` as the dataclass ``cls`` has them.

    Args:
        of: whose settings they are, for the message.

    Raises:
        InputError: one is unknown or does not fit.
    """
    if not isinstance(values, Mapping):
        raise InputError(f"{of} = {_brief(values)} is no table of settings")
    known = annotations_of(cls)
    if unknown := [name for name in values if name not in known]:
        raise InputError(f"{of} has no setting {unknown[0]!r}; it has: {', '.join(known) or 'none'}")
    return {name: value_of(known[name], value, f"{of}: {name}") for name, value in values.items()}


class Checked:
    """Base of a frozen dataclass whose values are checked when it is made, wherever they come from."""

    def __post_init__(self) -> None:
        for name, value in fitted(type(self), vars(self), getattr(self, "name", type(self).__name__)).items():
            object.__setattr__(self, name, value)


def make(cls: type[T], values: Mapping[str, Any] | None, of: str) -> T:
    """An instance of the dataclass ``cls``.

    Args:
        of: whose settings the values are, for the message.

    Raises:
        InputError: a value is missing, unknown or does not fit.
    """
    values = fitted(cls, values or {}, of)
    try:
        return cls(**values)
    except TypeError as error:  # a field without a default
        raise InputError(f"{of}: {str(error).split(') ')[-1]}") from None
