"""The command: ``python -m memorization COMMAND ...``, one file a subcommand; memorization/flags.py has its flags."""

from __future__ import annotations

import importlib
import sys

from memorization.errors import InputError
from memorization.flags import Arguments, run_script
from memorization.launch import in_all, start

COMMANDS = {
    "detect": "score prompts, or pictures, for memorization",
    "eval": "tables, intervals, pictures and calibrations of scored runs",
    "mitigate": "make memorized prompts safe",
    "audit": "which training pictures a fine-tune copies, and from which epoch on",
    "report": "one page of a run, to hand on, or a section of a model card",
    "gate": "may this be shipped? exit status 0 or 3",
    "adapter": "change a finished adapter, without data",
    "calibrate": "thresholds for the guard of a pipeline, from ordinary prompts alone",
    "index": "build and search a local index of training pictures",
    "study": "the studies behind the project's tables",
    "prompts": "fetch the prompt lists that the field has published",
    "models": "the models that are known by name",
}


@in_all
def dispatch(arguments: Arguments = None) -> None:
    """Run the subcommand that the arguments name; only its file is read."""
    from memorization import __version__

    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] in ([], ["-h"], ["--help"]):
        lines = "\n".join(f"  {name:9} {what}" for name, what in COMMANDS.items())
        print(f"usage: python -m memorization COMMAND ... (COMMAND --help explains)\n\n{lines}")
    elif given[0] == "--version":
        print(__version__)
    elif given[0] not in COMMANDS:
        raise InputError(f"no command {given[0]!r}; there are: {', '.join(COMMANDS)}")
    else:
        start(importlib.import_module(f"memorization.cli.{given[0]}").main, given[1:])


def main() -> None:
    """The console script."""
    run_script(dispatch)
