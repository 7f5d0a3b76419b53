"""How much goes through a model at once."""

from __future__ import annotations

from collections.abc import Callable

from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

from memorization.errors import InputError
from memorization.models.base import TextToImage
from memorization.runs.store import Store


def default_batch_size(pipe: TextToImage) -> int:
    """Rows to a call of the denoiser. CUDA starts high, halved on out of memory; a CPU is kept within its caches."""
    if pipe.device.type == "cuda":
        return 64
    pixels = pipe.pure_noise(1, 0)[0, 0].numel()
    return min(32, max(4, 8192 // pixels))


def with_memory(work: Callable[[int], None], store: Store, batch_size: int) -> None:
    """``work(batch_size)``, again with half of it on out of memory, which is noted in the store for a resumed run.

    Raises:
        InputError: not even one row fits.
    """
    batch_size = store.record.get("batch_size_used", batch_size)
    while True:
        try:
            return work(batch_size)
        except RuntimeError as error:
            if not should_reduce_batch_size(error):
                raise
        if batch_size == 1:
            raise InputError("out of memory even with one row to a UNet call; try --dtype bfloat16")
        batch_size //= 2
        store.record["batch_size_used"] = batch_size
        store.save("running")
        clear_device_cache(garbage_collection=True)
