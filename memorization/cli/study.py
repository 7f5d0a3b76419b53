"""The studies, each a table and a picture: ``python -m memorization study NAME ...``"""

from __future__ import annotations

import importlib
import sys

from memorization.errors import InputError
from memorization.flags import Arguments
from memorization.launch import in_all, start
from memorization.studies import STUDIES


@in_all
def main(arguments: Arguments = None) -> None:
    """Run the study that the arguments name."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] in ([], ["-h"], ["--help"]):
        lines = "\n".join(f"  {name:20} {what}" for name, what in STUDIES.items())
        print(f"{__doc__}\n\n{lines}\n\nNAME --help explains.")
        return
    if given[0] not in STUDIES:
        raise InputError(f"no study {given[0]!r}; there are: {', '.join(STUDIES)}")
    start(importlib.import_module(f"memorization.studies.{given[0]}").main, given[1:])
