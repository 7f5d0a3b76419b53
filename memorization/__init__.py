"""Detect, measure and mitigate memorized training images in text-to-image diffusion models.

    import memorization as mem

    model = mem.load("testbed-eps")
    frame = mem.score(model, ["a red kite over two boats"], detectors=["anisotropy"], noises=4)
    result = mem.mitigate(model, frame["prompt"], "sail")

Nothing heavy is imported until it is used, and nothing is written unless a folder is asked for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

if TYPE_CHECKING:
    from memorization.api import Result, evaluate, load, mitigate, score
    from memorization.detectors.base import DETECTORS
    from memorization.errors import InputError
    from memorization.guard.hooks import protect
    from memorization.mitigations.base import MITIGATIONS

    register_detector, register_mitigation = DETECTORS.register, MITIGATIONS.register

_PUBLIC = {  # name -> (module, attribute)
    "load": ("memorization.api", "load"),
    "score": ("memorization.api", "score"),
    "evaluate": ("memorization.api", "evaluate"),
    "mitigate": ("memorization.api", "mitigate"),
    "protect": ("memorization.guard.hooks", "protect"),
    "Result": ("memorization.api", "Result"),
    "register_detector": ("memorization.detectors.base", "DETECTORS.register"),
    "register_mitigation": ("memorization.mitigations.base", "MITIGATIONS.register"),
    "InputError": ("memorization.errors", "InputError"),
}

__all__ = [
    "InputError",
    "Result",
    "__version__",
    "evaluate",
    "load",
    "mitigate",
    "protect",
    "register_detector",
    "register_mitigation",
    "score",
]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, path = _PUBLIC[name]
    found: Any = importlib.import_module(module)
    for part in path.split("."):
        found = getattr(found, part)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
