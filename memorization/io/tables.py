"""Tables for people."""

from __future__ import annotations

import pandas as pd


def markdown(frame: pd.DataFrame) -> str:
    """A frame as a markdown table whose columns also line up in a terminal."""
    cells = [list(map(str, frame.columns)), *(list(map(str, row)) for row in frame.itertuples(index=False))]
    width = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    lines = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(row, width, strict=True)) + " |" for row in cells]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in width) + "|")
    return "\n".join(lines)
