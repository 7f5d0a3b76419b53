"""Tables for people."""

from __future__ import annotations

import pandas as pd

from memorization.errors import printable


def markdown(frame: pd.DataFrame) -> str:
    """A frame as a markdown table whose columns also line up in a terminal."""
    rows = (frame.columns, *frame.itertuples(index=False))
    cells = [[printable(str(cell)) for cell in row] for row in rows]
    width = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    lines = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(row, width, strict=True)) + " |" for row in cells]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in width) + "|")
    return "\n".join(lines)
