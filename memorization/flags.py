"""How a command reads its arguments and says what is wrong with them."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

from memorization.errors import InputError


class ArgumentParser(argparse.ArgumentParser):
    """argparse's, which says what is wrong in one line; the docstring it is given keeps its line breaks."""

    def __init__(self, **options) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def error(self, message: str) -> None:
        raise InputError(f"{message} (--help explains)")


def run_script(main: Callable[[], None]) -> None:
    """Run a script's main: exit status 2 and one line on standard error for an :class:`InputError`."""
    try:
        main()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:  # the reader of our output has gone, as in `| head`
        sys.stderr.close()
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(1)
