"""``python -m memorization.prompts fetch``, the same as ``python -m memorization prompts fetch``."""

from memorization.cli.prompts import main
from memorization.flags import run_script

if __name__ == "__main__":
    run_script(main)
