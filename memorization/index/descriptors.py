"""What pictures are compared by in an index: the kinds of features and what makes them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from memorization.errors import InputError
from memorization.index.kinds import NETWORKED

SSCD_PRESET = "amg-224"  # as AMG's authors feed it, since their gates are of it

Describe = Callable[[Tensor], Tensor]


def descriptor(kind: str, size: tuple[int, int] | None, model: str | None) -> tuple[Describe, str | None, str | None]:
    """(what makes features, name of the network that makes them, what tells its weights from others).

    Features ``(n, width)`` of pictures ``(n, 3, h, w)`` in [-1, 1], on their device; differentiable.

    Args:
        size: (height, width) that pictures are brought to, for ``pixels`` and ``latents``.
        model: checkpoint of the network, for ``clip`` and ``latents``.

    Raises:
        InputError: the network cannot be had.
    """

    def resized(pictures: Tensor) -> Tensor:
        if tuple(pictures.shape[-2:]) == size:
            return pictures
        return interpolate(pictures, size, mode="bicubic", antialias=True)

    if kind == "pixels":
        return lambda pictures: resized(pictures).flatten(1), None, None
    if kind in NETWORKED and model is None:
        raise InputError(f"features {kind!r} need a checkpoint: --model FOLDER|HUB_ID")
    # Networks are imported where they are needed: an index of pixels needs none, and they take seconds.
    if kind == "latents" and model:
        from memorization.models.checkpoint import identity_of
        from memorization.models.decoding import encode_pixels
        from memorization.models.loading import load_autoencoder

        vae, folder = load_autoencoder(model)
        revision = identity_of(folder, ["vae"])["vae"]
        return lambda pictures: encode_pixels(vae.to(pictures.device), resized(pictures)).flatten(1), model, revision
    if kind == "clip" and model:
        from memorization.similarity.clip import Clip

        clip = Clip(model)
        return clip.describe, model, clip.revision
    from memorization.similarity.sscd import SSCD

    sscd = SSCD(SSCD_PRESET)
    return sscd.describe, sscd.name, sscd.revision


def description(
    kind: str, size: tuple[int, int] | None, model: str | None, device: torch.device | str = "cpu"
) -> tuple[Describe, dict]:
    """What makes features, and what ``index.json`` says of them.

    Raises:
        InputError: as :func:`descriptor`.
    """
    describe, name, revision = descriptor(kind, size, model)
    with torch.no_grad():
        width = describe(torch.zeros(1, 3, *(size or (64, 64)), device=device)).shape[1]
    network = {"model": name, "revision": revision} if name else {}
    return describe, {"kind": kind, "size": size and list(size), "width": width, **network}
