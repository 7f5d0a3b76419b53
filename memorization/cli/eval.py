"""Evaluate scored runs: metrics table with 95% intervals, metrics.json and pictures in each run's folder.

  python detect_eval.py                                 every run under results/
  python detect_eval.py results/detection/testbed-eps/main --format csv
  python detect_eval.py results/detection/testbed-eps/main --by kind
  python detect_eval.py results/detection/testbed-eps/main --calibrate mine.yaml --fpr 0.01

Where a list has a column "split", its rows "validation" are for --calibrate alone; the table is of the others.
TPR@1% is the largest TPR with FPR <= 1%; the FPR realised there and the number of negatives stand beside it. Intervals
resample whole families of near-copies.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from memorization.errors import InputError, printable
from memorization.flags import ArgumentParser, Arguments, add_flags, value
from memorization.paths import ROOT


def parse(arguments: Arguments = None) -> argparse.Namespace:
    """The flags, checked."""
    parser = ArgumentParser(description=__doc__)
    add = parser.add_argument
    # fmt: off
    add("runs", nargs="*", type=Path, metavar="RUN", help="run folders (default: every run under results/)")
    add("--format", choices=["md", "csv", "json"], default="md", help="of the table (default: %(default)s)")
    add_flags(parser, "--resamples", default=2000)
    add("--weights", nargs=2, type=value(float), metavar=("NORM", "COSINE"),
        help="one more row: the sum of the two terms with these weights, as in --weights 1 2")
    add("--by", metavar="COLUMN", help="one more table: the memorized prompts of each value of this column of the list "
        "(kind, duplicates, ...), against all that are not memorized")
    add("--no-plots", action="store_true", help="draw no pictures")
    add("--calibrate", type=Path, metavar="FILE", help="write weights and thresholds of the one run given to FILE")
    add_flags(parser, "--fpr")
    # fmt: on
    args = parser.parse_args(arguments)
    args.folders = args.runs or every_run()
    if not args.folders:
        raise InputError("no run under results/; start with: bash run_detection.sh")
    if args.calibrate and len(args.folders) != 1:
        parser.error("--calibrate takes one run")
    return args


def every_run() -> list[Path]:
    """The folders of all detection runs under ``results/``, and of those of which nobody can say what they are."""
    return sorted(path.parent for path in (ROOT / "results").glob("**/run.json") if not _of_another_kind(path))


def _of_another_kind(path: Path) -> bool:
    from memorization.io.records import read_record

    try:
        return "detectors" not in read_record(path)["settings"]
    except InputError:
        return False  # it is left out with a line, not silently


def main(arguments: Arguments = None) -> None:
    """Parse, evaluate, print."""
    args = parse(arguments)
    if args.calibrate:
        write_calibration(args)
        return
    from memorization.evaluation.report import draw, evaluate
    from memorization.evaluation.runs import read_run
    from memorization.io.files import write_atomically

    all_metrics = []
    for folder in args.folders:
        try:
            run = read_run(folder)
        except InputError as error:
            if args.runs:
                raise
            print(f"left out: {error}", file=sys.stderr)
            continue
        metrics = evaluate(run, args.resamples, args.weights, args.by)
        write_atomically(folder / "metrics.json", json.dumps(metrics, indent=1) + "\n")
        if not args.no_plots:
            draw(run, folder)
        all_metrics.append(metrics)
    print_tables(all_metrics, args.format)


def write_calibration(args: argparse.Namespace) -> None:
    """``--calibrate``."""
    import yaml

    from memorization.evaluation.calibration import calibration_of
    from memorization.evaluation.runs import read_run
    from memorization.io.files import write_atomically
    from memorization.runs.calibrate import calibrate

    made = calibrate(read_run(args.folders[0]), args.fpr)
    calibration_of(made, args.calibrate)  # what could not be read again is not written
    write_atomically(args.calibrate, yaml.safe_dump(made, sort_keys=False))
    print(f"{printable(str(args.calibrate))}: from {made['negatives']} negatives and {made['positives']} positives")


def print_tables(all_metrics: list[dict], style: str) -> None:
    """Every run's table on standard output, as md, csv or json."""
    import pandas as pd

    from memorization.evaluation.report import REFERENCE, by_table, paired_table, table
    from memorization.io.tables import markdown

    if style == "json":
        print(json.dumps(all_metrics, indent=1))
    elif style == "csv":
        frames = [
            table(metrics).assign(model=metrics["model"], run=printable(metrics["run"])) for metrics in all_metrics
        ]
        pd.concat(frames).to_csv(sys.stdout, index=False)
    else:
        for metrics in all_metrics:
            counts = metrics["counts"]
            print(f"\n### {printable(metrics['model'])}, {printable(metrics['run'])}: {counts['memorized']} memorized, "
                  f"{counts['not_memorized']} not memorized, {counts['families']} families\n")  # fmt: skip
            print(markdown(table(metrics)))
            if metrics["paired"]:
                print(f"\nAgainst {REFERENCE}, on the same resamples:\n")
                print(markdown(paired_table(metrics)))
            if "by" in metrics:
                print(f"\nBy {metrics['by']['column']}:\n")
                print(markdown(by_table(metrics)))
