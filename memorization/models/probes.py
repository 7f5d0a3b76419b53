"""Random directions in which derivatives are probed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def random_signs(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Entries -1 and 1, on the CPU: v with E[v . J v] = tr J and E[v * J v] = diag J (Hutchinson)."""
    return torch.randint(2, tuple(shape), generator=generator) * 2.0 - 1
