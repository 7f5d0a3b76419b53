"""Where a model runs and in which number format."""

from __future__ import annotations

import torch

from memorization.errors import InputError
from memorization.launch import launched

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def pick_device(name: str = "auto") -> torch.device:
    """``auto`` is CUDA where there is one, else the CPU; of several processes each has a CUDA device of its own.

    Raises:
        InputError: there is no such device, or none for this process.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = _own_device() if name == "cuda" and launched().count > 1 else torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(f"device {name!r} cannot be used: {str(error).splitlines()[0]}") from None
    return device


def _own_device() -> torch.device:
    """The CUDA device of one of several processes, from now on the one that "cuda" means."""
    place, there = launched(), torch.cuda.device_count()
    if there > 1 and place.local >= there:
        raise InputError(f"LOCAL_RANK={place.local}, but this machine has {there} CUDA devices; start {there} on it")
    device = torch.device("cuda", place.local if there > 1 else 0)  # batch systems may show each process its own alone
    torch.cuda.set_device(device)
    return device


def pick_dtype(name: str | None, device: torch.device) -> str:
    """The dtype asked for, or bfloat16 where the hardware has it; else float16 on CUDA, float32 on a CPU."""
    if name:
        return name
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
    has = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    return "bfloat16" if has.get("avx512_bf16") or has.get("amx_bf16") else "float32"
