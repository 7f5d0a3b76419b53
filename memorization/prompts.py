"""``python -m memorization.prompts fetch``; memorization/io/published.py does the work."""

from memorization.flags import run_script
from memorization.io.published import main

if __name__ == "__main__":
    run_script(main)
