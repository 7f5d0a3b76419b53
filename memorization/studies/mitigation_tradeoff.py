"""Every mitigation at five strengths: ``python -m memorization.studies.mitigation_tradeoff --model testbed-eps``

On memorized and on ordinary prompts of a labelled list, all from the same noise: how many pictures are still copies,
against how well they fit the prompt; what the method does to ordinary prompts, which need none; seconds a prompt. With
``--attack`` also how many copies come back when the embedding is optimised towards the training picture (DoRI).
Intervals resample families. A killed study goes on where it stopped, and other methods may be added to a finished one.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping

from memorization.evaluation.calibration import Calibration
from memorization.flags import ArgumentParser, Arguments, names, run_script
from memorization.mitigations.base import MITIGATIONS, make_mitigation
from memorization.runs.attack import Attack
from memorization.similarity.judge import Measure
from memorization.studies.compare import PLAIN, Row, attacked_name
from memorization.studies.compare_prompts import Bench, add_comparison_arguments
from memorization.studies.compare_report import at_equal_alignment, draw_sheet, print_table, write_report


def row_name(method: str, strength: float) -> str:
    """Of a method at a strength."""
    return f"{method} {strength:g}"


def without_levels(calibration: Calibration) -> list[str]:
    """Methods that lower a score to a level which the calibration lacks."""
    return [name for name, cls in MITIGATIONS.items() if cls.lowers and cls.lowers not in calibration.levels]


def main(arguments: Arguments = None, measures: Mapping[str, Measure] | None = None) -> None:
    """Compare; ``measures``: of the judge, beside its own."""
    parser = ArgumentParser(description=__doc__)
    add_comparison_arguments(parser, memorized=16)
    parser.add_argument(
        "--methods", default="all", metavar="A,B|all", help=f"of {', '.join(MITIGATIONS)} (default: all)"
    )
    parser.add_argument(
        "--attack", nargs="?", const="default", choices=["default", "all"], help="attack the embeddings that each "
        "method gives, at its default strength or at all of them: how many copies come back"
    )  # fmt: skip
    args = parser.parse_args(arguments)
    methods = list(MITIGATIONS) if args.methods == "all" else names(args.methods)
    strengths = {name: MITIGATIONS.find(name).strengths for name in methods}
    bench = Bench(args, "mitigation_tradeoff", measures)
    if args.methods == "all":
        for name in without_levels(bench.calibration):
            print(f"left out: {name}, of whose score the calibration has no levels", file=sys.stderr)
            del strengths[name]
    rows = [bench.row(name, {"strength": strength}, row_name(name, strength))
            for name, several in strengths.items() for strength in several]  # fmt: skip
    if args.attack:
        every = [row for row in rows if args.attack == "all" or row.strength == make_mitigation(row.method).strength]
        rows += [row.attacked(Attack()) for row in (Row(PLAIN, PLAIN), *every)]
    with bench.compared(rows) as comparison:
        plain = [row_name(name, make_mitigation(name).strength) for name in MITIGATIONS]
        shown = [name for row in (PLAIN, *plain) for name in (row, attacked_name(row)) if name != PLAIN]
        draw_sheet(comparison, shown, bench.items, bench.judge, bench.out / "sheet.png")
    table = write_report(bench.out, args.resamples, bench.title)
    print_table(table.drop(columns="row"))
    if "clip" in table:
        print_table(at_equal_alignment(table))
    print(f"{bench.out}/table.csv, tradeoff.png, sheet.png")


if __name__ == "__main__":
    run_script(main)
