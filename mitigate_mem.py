#!/usr/bin/env python
"""Make memorized prompts safe: prompts -> other text, embeddings, noise or guidance, with pictures and measurements.

python mitigate_mem.py --model testbed-eps        --help lists the flags; the same as python -m memorization mitigate
"""

from memorization.cli.mitigate import main
from memorization.flags import run_script

if __name__ == "__main__":
    run_script(main)
