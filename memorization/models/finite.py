"""NaN and infinity are refused where numbers leave a model, before a picture is black or a score is NaN."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from memorization.errors import InputError


def check_finite(values: Tensor, what: str, names: Sequence[str] = ()) -> None:
    """See that ``values (rows, ...)`` are finite.

    Args:
        what: they are, for the message.
        names: of the rows, such as their prompts; their numbers where there are none.

    Raises:
        InputError: one is not; names the row.
    """
    broken = (~values.isfinite().reshape(len(values), -1).all(1)).nonzero()
    if len(broken):
        row = int(broken[0])
        raise InputError(f"{what} is NaN or infinite for {(names[row] if names else row)!r}; try --dtype float32")
