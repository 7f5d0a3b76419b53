#!/usr/bin/env python
"""Score prompts for memorization: prompt list -> results/<run>/scores.jsonl, a line a prompt.

python detect_mem.py --model testbed-eps          --help lists the flags; the same as python -m memorization detect
"""

from memorization.cli.detect import main
from memorization.flags import run_script

if __name__ == "__main__":
    run_script(main)
