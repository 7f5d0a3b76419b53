"""``python -m memorization.index``, the same as ``python -m memorization index``."""

from memorization.cli.index import main
from memorization.flags import run_script

if __name__ == "__main__":
    run_script(main)
