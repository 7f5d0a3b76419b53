"""Where the project's files lie."""

from __future__ import annotations

from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
CONFIGS = PACKAGE / "configs"
# The checkout that this package lies in. Where it was installed there is none: relative names are then of the folder
# in which the program was started, and the shipped models, their prompts and calibrations are not at hand.
ROOT = PACKAGE.parent if (PACKAGE.parent / "pyproject.toml").is_file() else Path.cwd()


def in_project(path: Path) -> str:
    """A file of the project relative to it, so that the project can be moved; others as they are."""
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else str(path)


def default_out(*names: str) -> Path:
    """Where a run goes if nothing else was asked for, by what it is, its model and its own name."""
    return ROOT.joinpath("results", "local", *map(safe_name, names))


def safe_name(name: str) -> str:
    """A name that every system takes for a file: no ``<>:"/\\|?*``, none of Windows' reserved names."""
    safe = "".join("_" if letter in '<>:"/\\|?*' or letter < " " else letter for letter in name).rstrip(". ") or "_"
    reserved = {"con", "prn", "aux", "nul", *(f"{port}{i}" for port in ("com", "lpt") for i in range(10))}
    return f"{safe}_" if safe.split(".")[0].lower() in reserved else safe
