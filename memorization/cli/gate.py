"""May this be shipped? Exit status 0 if the share of copies is small enough, 3 if not, 2 for bad input.

  python -m memorization gate results/local/audit/base/folder --max-copies 0.01 --confidence 0.95

RUN is an audit (copies among the pictures of an epoch's captions, as far as they are more than the base's; and no
training picture may count as copied) or a detection run with a calibration (flagged families of prompts). Not the share
that was seen decides, but the upper end of its interval: too few pictures do not pass. One line on standard error says
why, and how many would; standard output is JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

from memorization.errors import printable
from memorization.flags import ArgumentParser, Arguments, value
from memorization.settings import Bounds

STOPPED = 3  # exit status
SHARE = Annotated[float, Bounds(1e-6, 1 - 1e-6)]


def parse(arguments: Arguments = None) -> argparse.Namespace:
    """The flags, checked."""
    parser = ArgumentParser(description=__doc__)
    add = parser.add_argument
    # fmt: off
    add("run", type=Path, metavar="RUN", help="folder of an audit or a detection run")
    add("--max-copies", type=value(SHARE), default=0.01, metavar="X", help="share that is allowed; of an audit, beyond "
        "the base's (default: %(default)s)")
    add("--confidence", type=value(SHARE), default=0.95, metavar="X", help="of the upper end (default: %(default)s)")
    add("--epoch", metavar="NAME", help="of an audit (default: its last)")
    # fmt: on
    return parser.parse_args(arguments)


def main(arguments: Arguments = None) -> None:
    """Parse, decide, say why."""
    args = parse(arguments)
    from memorization.report.gate import decide

    decision = decide(args.run, args.max_copies, args.confidence, args.epoch)
    print(json.dumps({"run": str(args.run), **asdict(decision)}))
    print(printable(str(decision)), file=sys.stderr)
    if not decision.passed:
        sys.exit(STOPPED)
