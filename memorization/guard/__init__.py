"""A guard for a user's own diffusers pipeline: one line in front of it.

    from memorization.guard import protect

    with protect(pipe, "thresholds.yaml", action="reseed") as guard:
        images = pipe("a red kite").images
        print(guard.verdicts[0])

Nothing heavy is imported until it is used: the node of a host program needs torch alone.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from memorization.guard.calibrating import calibrate
    from memorization.guard.hooks import Guard, protect
    from memorization.guard.verdict import GuardWarning, Refused, Verdict

_PUBLIC = {
    "calibrate": "calibrating",
    "Guard": "hooks",
    "protect": "hooks",
    "GuardWarning": "verdict",
    "Refused": "verdict",
    "Verdict": "verdict",
}

__all__ = ["Guard", "GuardWarning", "Refused", "Verdict", "calibrate", "protect"]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_PUBLIC[name]}"), name)
