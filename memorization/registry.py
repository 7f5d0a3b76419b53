"""Methods by name: those of the package, those that installed packages bring, and those that were registered."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from importlib.metadata import entry_points
from typing import Generic, TypeVar

from memorization.errors import InputError
from memorization.settings import make

M = TypeVar("M")
C = TypeVar("C", bound=type)


class Registry(Mapping[str, type[M]], Generic[M]):
    """Name -> class of every method of a kind. A method's file is read when the method is asked for.

    Args:
        kind: what they are, for messages.
        package: where the files of the built-in ones lie, each ``<package>.<name>``.
        names: of the built-in ones, in the order of tables.
        group: of the entry points by which installed packages bring others.
    """

    def __init__(self, kind: str, package: str, names: tuple[str, ...], group: str) -> None:
        self.kind, self.package, self.group = kind, package, group
        self._built_in = names
        self._found: dict[str, type[M]] = {}

    def register(self, cls: C) -> C:
        """Add a method under its ``name``; a decorator.

        Raises:
            InputError: it has no name, or the name is another's.
        """
        name = getattr(cls, "name", "")
        if not name:
            raise InputError(f"{cls.__name__}: a {self.kind} needs a name")
        taken = self._found.get(name)
        if (taken is not None and taken.__qualname__ != cls.__qualname__) or (
            name in self._built_in and cls.__module__ != f"{self.package}.{name}"
        ):
            raise InputError(f"{cls.__name__}: there is a {self.kind} {name!r} already")
        self._found[name] = cls  # ty: ignore[invalid-assignment]
        return cls

    def _brought(self) -> dict:
        """Entry points by name."""
        return {point.name: point for point in entry_points(group=self.group)}

    def __getitem__(self, name: str) -> type[M]:
        if name not in self._found:
            if name in self._built_in:
                importlib.import_module(f"{self.package}.{name}")  # registers it
            elif name in (brought := self._brought()):
                self.register(brought[name].load())
        return self._found[name]

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys([*self._built_in, *self._brought(), *self._found]))

    def __len__(self) -> int:
        return len(list(iter(self)))

    def find(self, name: str) -> type[M]:
        """The class of a name.

        Raises:
            InputError: there is none.
        """
        try:
            return self[name]
        except KeyError:
            raise InputError(f"unknown {self.kind} {name}; there are: {', '.join(self)}") from None

    def make(self, name: str, settings: Mapping | None = None) -> M:
        """A method with its default settings or others.

        Raises:
            InputError: there is none of that name, it has no such setting, or a value makes no sense.
        """
        return make(self.find(name), settings, name)
