"""One page of a run, to hand on: a self-contained HTML file beside it.

  python -m memorization report results/local/audit/base/folder                 RUN/report.html
  python -m memorization report results/local/audit/base/folder --hashes-only   without pictures, prompts and file names
  python -m memorization report results/local/audit/base/folder --card          a section for a model card, as Markdown

RUN is the folder of an audit, a detection run or a run of mitigation.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from memorization.errors import printable
from memorization.flags import ArgumentParser, Arguments


def parse(arguments: Arguments = None) -> argparse.Namespace:
    """The flags, checked."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, metavar="RUN", help="its folder")
    parser.add_argument("--hashes-only", action="store_true", help="hashes in the place of pictures, prompts and names "
                        "of files")  # fmt: skip
    parser.add_argument("--card", action="store_true", help="print a section of a model card instead, under metadata "
                        "in the form of huggingface_hub")  # fmt: skip
    return parser.parse_args(arguments)


def main(arguments: Arguments = None) -> None:
    """Parse, write or print."""
    args = parse(arguments)
    from memorization.report.make import model_card, write_report

    if args.card:
        print(model_card(args.run, args.hashes_only), end="")
    else:
        print(printable(str(write_report(args.run, args.hashes_only))))
