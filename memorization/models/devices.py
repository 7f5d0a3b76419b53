"""Where a model runs and in which number format."""

from __future__ import annotations

import torch

from memorization.errors import InputError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def pick_device(name: str = "auto") -> torch.device:
    """``auto`` is CUDA where there is one, else the CPU."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(f"device {name!r} cannot be used: {str(error).splitlines()[0]}") from None
    return device


def pick_dtype(name: str | None, device: torch.device) -> str:
    """The dtype asked for, or bfloat16 where the hardware has it; else float16 on CUDA, float32 on a CPU."""
    if name:
        return name
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
    has = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    return "bfloat16" if has.get("avx512_bf16") or has.get("amx_bf16") else "float32"
