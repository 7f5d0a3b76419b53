"""``python -m memorization``; see memorization/cli."""

from memorization.cli import main

if __name__ == "__main__":
    main()
