"""Frechet distance between two folders of pictures: ``python -m memorization.similarity.frechet LEFT RIGHT``

    || mu_1 - mu_2 ||^2 + tr(C_1 + C_2 - 2 (C_1 C_2)^(1/2))

FID is this on Inception-v3 features (Heusel et al., NeurIPS 2017): ``--features inception``, by the optional package
torch-fidelity, which fetches its own weights and gives KID too. Where they cannot be had, take the features of SSCD or
of a CLIP checkpoint. Values by different features, or of sets of different size, cannot be compared.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate
from tqdm import tqdm

from memorization.errors import InputError
from memorization.flags import ArgumentParser, run_script
from memorization.io.pictures import SUFFIXES, list_pictures, read_picture, to_bytes, to_tensor
from memorization.similarity.clip import Clip
from memorization.similarity.sscd import SSCD


def _root(matrix: np.ndarray) -> np.ndarray:
    """The symmetric square root of a symmetric matrix without negative eigenvalues."""
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * np.sqrt(values.clip(0))) @ vectors.T


def frechet_distance(left: np.ndarray, right: np.ndarray) -> float:
    """Between ``(n, width)`` and ``(m, width)``, at least two rows each; at least 0."""
    left, right = left.astype(np.float64), right.astype(np.float64)
    means = np.square(left.mean(0) - right.mean(0)).sum()
    first, second = np.cov(left, rowvar=False), np.cov(right, rowvar=False)
    root = _root(first)
    cross = np.sqrt(np.linalg.eigvalsh(root @ second @ root).clip(0)).sum()
    return float(max(0.0, means + np.trace(first) + np.trace(second) - 2 * cross))


class Reference:
    """Frechet distance, on the features of ``clip``, to pictures as they should look, uint8 ``(n, h, w, 3)``.

    Pictures are brought to the size of these first, so that both sides are about as sharp.
    """

    def __init__(self, pictures: np.ndarray, clip: Clip) -> None:
        self.pictures, self.clip, self.size = pictures, clip, pictures.shape[1:3]

    @cached_property
    def features(self) -> np.ndarray:
        """Of the reference, made when it is first compared with."""
        return self.clip.pictures(self.pictures).numpy()

    def distance(self, pictures: np.ndarray) -> float:
        """Of uint8 ``(n, h, w, 3)``, at least two."""
        if pictures.shape[1:3] != self.size:
            pictures = to_bytes(interpolate(to_tensor(pictures), self.size, mode="bicubic", antialias=True))
        return frechet_distance(self.clip.pictures(pictures).numpy(), self.features)


def features_of(folder: Path, embed: Callable[[np.ndarray], np.ndarray | Tensor]) -> np.ndarray:
    """Features ``(n, width)`` of the pictures of a folder, read one at a time."""
    paths = list_pictures(folder)["image"]
    return np.concatenate(
        [np.asarray(embed(read_picture(Path(path), None)[None])) for path in tqdm(paths, desc=folder.name)]
    )


def inception(left: Path, right: Path) -> dict[str, float]:
    """FID and KID by torch-fidelity.

    Raises:
        InputError: it is not installed.
    """
    if importlib.util.find_spec("torch_fidelity") is None:
        raise InputError("--features inception needs the package torch-fidelity: pip install torch-fidelity")
    from torch_fidelity import calculate_metrics

    smaller = min(len(list_pictures(folder)) for folder in (left, right))
    return calculate_metrics(
        input1=str(left),
        input2=str(right),
        fid=True,
        kid=True,
        kid_subset_size=min(1000, smaller),
        verbose=False,
        cuda=torch.cuda.is_available(),
        samples_find_ext=",".join(suffix[1:] for suffix in sorted(SUFFIXES)),
    )


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("left", type=Path)
    parser.add_argument("right", type=Path)
    parser.add_argument("--features", default="sscd", metavar="sscd|inception|CLIP",
        help="sscd, inception, or the folder or hub id of a CLIP checkpoint (default: %(default)s)")  # fmt: skip
    args = parser.parse_args()
    if min(len(list_pictures(folder)) for folder in (args.left, args.right)) < 2:
        raise InputError("both folders need two pictures or more")
    if args.features == "inception":
        for name, value in inception(args.left, args.right).items():
            print(f"{name}: {value:.4g}")
        return
    embed = SSCD() if args.features == "sscd" else Clip(args.features).pictures
    value = frechet_distance(features_of(args.left, embed), features_of(args.right, embed))
    print(f"Frechet distance, {args.features}: {value:.4g}")


if __name__ == "__main__":
    run_script(main)
