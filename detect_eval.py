#!/usr/bin/env python
"""Evaluate scored runs: metrics table with 95% intervals, metrics.json and pictures in each run's folder.

python detect_eval.py                             --help lists the flags; the same as python -m memorization eval
"""

from memorization.cli.eval import main
from memorization.flags import run_script

if __name__ == "__main__":
    run_script(main)
