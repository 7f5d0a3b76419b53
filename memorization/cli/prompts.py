"""Download the field's prompt lists (pinned commit, sha256 checked): ``python -m memorization prompts fetch``"""

from __future__ import annotations

from pathlib import Path

from memorization.flags import ArgumentParser, Arguments
from memorization.paths import ROOT


def main(arguments: Arguments = None) -> None:
    """Parse, fetch, print."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("command", choices=["fetch"])
    parser.add_argument("--from", dest="source", metavar="DIR|URL", help="a mirror that holds the files by their names")
    parser.add_argument("--out", type=Path, default=ROOT / "prompts" / "published", help="default: prompts/published")
    args = parser.parse_args(arguments)
    from memorization.io.published import fetch

    for path in fetch(args.out, args.source):
        print(path)
