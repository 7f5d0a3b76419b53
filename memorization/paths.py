"""Where the project's files lie."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parent.parent
CONFIGS = Path(__file__).parent / "configs"
