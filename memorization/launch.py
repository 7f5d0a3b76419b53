"""Which of several processes of one command this is, as torchrun, accelerate launch and batch systems say it."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import NamedTuple

from memorization.errors import InputError

Main = Callable[..., None]  # of a command
VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK")


class Launch(NamedTuple):
    """A process's place among those of a launch.

    Attributes:
        rank: its number, from 0: the main process, which alone prints, draws and writes what a run comes to.
        count: of processes, on all machines.
        local: its number among those of its machine.
    """

    rank: int = 0
    count: int = 1
    local: int = 0

    @property
    def main(self) -> bool:
        return self.rank == 0

    def named(self, rank: int) -> str:
        """A process for a message."""
        return f"rank {rank} of {self.count}"


def check_launch() -> Launch:
    """This process's place, by RANK, WORLD_SIZE and LOCAL_RANK; alone where there is no WORLD_SIZE.

    Raises:
        InputError: they make no sense together.
    """
    given = {name: os.environ.get(name) for name in VARIABLES}
    if given["WORLD_SIZE"] in (None, "1"):
        return Launch()
    with suppress(ValueError):
        place = Launch(*(int(value or "") for value in given.values()))
        if 0 <= place.rank < place.count and place.local >= 0:
            return place
    said = ", ".join(f"{name}={value}" for name, value in given.items())
    raise InputError(f"{said}: no place among processes; set all three (docs/many-gpus.md), or no WORLD_SIZE")


def launched() -> Launch:
    """As :func:`check_launch`, but alone where the three make no sense: what is not shared must not care.

    Some clusters set RANK and WORLD_SIZE in every shell, and they count machines.
    """
    try:
        return check_launch()
    except InputError:
        return Launch()


def in_all(main: Main) -> Main:
    """Mark a main that starts one of several others, in each process of a launch."""
    main.__dict__["in_all"] = True
    return main


def shared(main: Main) -> Main:
    """Mark a main whose run the processes of a launch share."""
    main.__dict__["shared"] = True
    return main


def start(main: Main, *given, **named) -> None:
    """Call a command's main; where it is not marked, all processes but the main one end, with exit status 0.

    Raises:
        InputError: it is shared, and this process's place makes no sense.
    """
    if hasattr(main, "shared"):
        check_launch()
    elif not hasattr(main, "in_all") and not launched().main:
        sys.exit()
    main(*given, **named)


def main_alone() -> None:
    """From here on a command is the main process's: the others end, with exit status 0."""
    if not launched().main:
        sys.exit()
    os.environ["WORLD_SIZE"] = "1"
