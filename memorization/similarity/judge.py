"""One judge of generated pictures, whoever made them: how near each is to the training pictures and to its prompt.

Nearness is to the prompt's own training picture where that is known, else to the nearest of all known ones, as the
labels of a verified list are measured:

    nl2         normalised pixel l2 (nl2.py), lower is nearer
    sscd        cosine of SSCD features (sscd.py)
    clip_image  cosine of CLIP features (clip.py)

``clip`` is the CLIP score, the agreement with the prompt. Other measures may be added from outside, see ``Measure``; of
those whose names begin with ``nl2`` lower is nearer.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from memorization.io.pictures import read_picture, to_tensor
from memorization.models.base import TextToImage
from memorization.models.finite import check_finite
from memorization.similarity.clip import Clip
from memorization.similarity.nl2 import NEIGHBOURS, l2, normalized_l2
from memorization.similarity.sscd import SSCD, find_weights

NEARNESS = ("nl2", "sscd", "clip_image")
# Where the field counts copies: below nL2 1.4 and 1.6 and above SSCD .4 (Chen et al., CVPR 2024), above SSCD .5 (Pizzi
# et al., CVPR 2022). The first of each holds for a model that has no limit of its own.
FIELD_LIMITS = {"nl2": (1.4, 1.6), "sscd": (0.5, 0.4)}

# Pictures of one prompt on several noises, uint8 (n, h, w, 3), and the prompt, if there is one -> a value a picture.
Measure = Callable[[np.ndarray, str | None], Sequence[float]]


def is_distance(measure: str) -> bool:
    """Whether lower values of a measure of nearness are nearer."""
    return measure.startswith("nl2")


def is_copy(measure: str, values: np.ndarray, limit: float) -> np.ndarray:
    """Which ``values`` of a measure of nearness lie on the near side of ``limit``."""
    return values < limit if is_distance(measure) else values > limit


def copy_limits(own: Mapping[str, float]) -> dict[str, float]:
    """Measure of nearness -> the value at which copies are counted: the model's ``own`` first, then the field's."""
    return {**own, **{measure: limits[0] for measure, limits in FIELD_LIMITS.items() if measure not in own}}


def copies_title(measure: str, limit: float) -> str:
    """What a table calls their share: ``nl2 < 1.4``, ``sscd > .5``."""
    return f"{measure} {'<' if is_distance(measure) else '>'} {f'{limit:g}'.removeprefix('0')}"


@dataclass(frozen=True)
class TrainingPictures:
    """Known training pictures: uint8 ``(n, h, w, 3)``, of the size of those to judge, and their files where known."""

    pictures: np.ndarray
    files: Sequence[Path] = ()

    @classmethod
    def read(cls, files: Sequence[Path], size: tuple[int, int]) -> TrainingPictures:
        """Each file once, brought to ``size`` (height, width).

        Raises:
            InputError: a file is no picture.
        """
        files = list(dict.fromkeys(files))
        pictures = [read_picture(file, size) for file in files]
        return cls(np.stack(pictures) if files else np.empty((0, *size, 3), np.uint8), files)

    def __len__(self) -> int:
        return len(self.pictures)

    @property
    def revision(self) -> str:
        """Tells the pictures from others."""
        return f"sha256:{hashlib.sha256(self.pictures.tobytes()).hexdigest()}"


@dataclass
class Judge:
    """Measures pictures of a prompt. What it lacks is left out: a network, or 50 training pictures for nL2.

    Args:
        training: those that are known.
        clip: for the CLIP score and nearness by CLIP features.
        sscd: for nearness by SSCD.
        others: further measures by name.

    Attributes:
        description: what its values depend on, for a run's settings.
    """

    training: TrainingPictures
    clip: Clip | None = None
    sscd: SSCD | None = None
    others: Mapping[str, Measure] = field(default_factory=dict)

    def __post_init__(self) -> None:
        pictures = self.training.pictures
        networks = {"clip": self.clip, "sscd": self.sscd}
        self.description = {
            **{name: network and network.name for name, network in networks.items()}, "training": len(self.training),
            "revision": {**{name: network.revision for name, network in networks.items() if network},
                         "training": self.training.revision},
        } | ({"others": sorted(self.others)} if self.others else {})  # fmt: skip
        self._place = {file: i for i, file in enumerate(self.training.files)}
        self._pixels = torch.from_numpy(pictures).permute(0, 3, 1, 2)
        self._by_sscd = self.sscd(pictures) if self.sscd and len(pictures) else None
        self._by_clip = self.clip.pictures(pictures) if self.clip and len(pictures) else None

    @property
    def measures(self) -> list[str]:
        """Those that it can take."""
        known = {"nl2": len(self.training) >= NEIGHBOURS, "sscd": self._by_sscd is not None,
                 "clip_image": self._by_clip is not None, "clip": self.clip is not None}  # fmt: skip
        return [*(name for name, can in known.items() if can), *self.others]

    def __call__(
        self, pictures: np.ndarray, prompt: str | None = None, image: Path | None = None
    ) -> dict[str, list[float]]:
        """A value a picture under the name of each measure, to four digits.

        Args:
            pictures: uint8 ``(n, h, w, 3)``.
            prompt: what was asked for, before any change.
            image: its training picture, one of the known files.

        Raises:
            InputError: a value is not finite; names the prompt.
        """
        values: dict[str, Sequence[float]] = {}
        features = None
        if self.clip:
            features = self.clip.pictures(pictures)
            if prompt is not None:
                values["clip"] = (features @ self.clip.prompts([prompt])[0]).tolist()
        for measure, table in self._tables(pictures, features).items():
            nearest = table.amin(1) if is_distance(measure) else table.amax(1)
            values[measure] = (nearest if image is None else table[:, self._place[image]]).tolist()
        for name, measure in self.others.items():
            values[name] = measure(pictures, prompt)
        for name, column in values.items():
            check_finite(torch.tensor(column), name, [prompt or "a picture"] * len(pictures))
        return {name: [round(float(value), 4) for value in column] for name, column in values.items()}

    def _tables(self, pictures: np.ndarray, features: Tensor | None) -> dict[str, Tensor]:
        """``(pictures, training pictures)`` by measure."""
        found = {}
        if len(self.training) >= NEIGHBOURS:
            found["nl2"] = normalized_l2(to_tensor(pictures), self._pixels)
        if self.sscd and self._by_sscd is not None:
            found["sscd"] = torch.from_numpy(self.sscd(pictures) @ self._by_sscd.T)
        if features is not None and self._by_clip is not None:
            found["clip_image"] = features @ self._by_clip.T
        return found

    def training_picture(self, picture: np.ndarray, image: Path | None = None) -> np.ndarray:
        """The training picture that a picture ``(h, w, 3)`` is measured against, uint8: ``image``, else the nearest."""
        if image is not None:
            return self.training.pictures[self._place[image]]
        return self.training.pictures[int(l2(to_tensor(picture[None]), self._pixels).argmin())]


def make_judge(
    pipe: TextToImage,
    training: Sequence[Path],
    clip: str | None,
    sscd: str = "official-288",
    others: Mapping[str, Measure] | None = None,
) -> Judge:
    """A judge of a pipeline's pictures, with SSCD where its weights are there.

    Args:
        training: files of the known training pictures.
        clip: folder or hub id; None or ``none`` for no CLIP.
        sscd: preset.
        others: further measures by name.
    """
    height, width = (side * pipe.vae_scale_factor for side in pipe.pure_noise(1, 0).shape[2:])
    scorer = Clip(clip, pipe.device) if clip and clip != "none" else None
    known = TrainingPictures.read(training, (height, width))
    return Judge(known, scorer, SSCD(sscd) if find_weights() else None, others or {})
