"""Score pictures instead of prompts, with the detectors that need a picture alone."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch

from memorization.detectors.base import DETECTORS, Detector, ImageDetector
from memorization.errors import InputError
from memorization.io.files import read_file
from memorization.io.pictures import list_pictures
from memorization.io.prompts import Listed
from memorization.models.base import TextToImage, check_able
from memorization.models.decoding import encode
from memorization.models.predictor import Predictor
from memorization.runs.scorer import as_rows, check_precision


def read_pictures(folder: Path) -> Listed:
    """The pictures of a folder, as :func:`list_pictures`; where they have labels, each is a family of its own.

    Raises:
        InputError: no such folder, no picture in it, or a picture that the metadata leaves out.
    """
    frame = list_pictures(folder)
    if "label" in frame and "family" not in frame:
        frame["family"] = [Path(path).name for path in frame["image"]]
    digest = hashlib.sha256(frame.to_csv(lineterminator="\n").encode("utf-8", "surrogateescape"))
    for path in frame["image"]:
        digest.update(read_file(Path(path)))
    return Listed(frame, {"images": digest.hexdigest()})


class PictureScorer:
    """Scores pictures, as a :class:`~memorization.runs.scorer.Scorer` does prompts.

    Args:
        batch_size: rows to a UNet call.

    Raises:
        InputError: a detector needs a prompt, or more precision than the model has.
    """

    columns = ("image", "prompt")
    prompts_at_once = 4

    def __init__(self, pipe: TextToImage, detectors: Sequence[Detector], *, batch_size: int) -> None:
        check_needs(detectors)
        check_able(pipe, detectors)
        check_precision(pipe, detectors)
        self.pipe, self.batch_size = pipe, batch_size
        self.detectors = [detector for detector in detectors if isinstance(detector, ImageDetector)]
        self.empty = pipe.embed([""])

    @torch.no_grad()
    def __call__(self, paths: Sequence[str], prompts: Sequence[str]) -> list[dict[str, list]]:
        """A dict of values a picture, each a list of one.

        Raises:
            InputError: a file is no picture, or a value is not finite; names the picture.
        """
        predict = Predictor(self.pipe, self.pipe.embed(prompts), self.empty, self.batch_size)
        clean, values = encode(self.pipe, paths), {}
        for detector in self.detectors:
            values |= {name: value[:, None] for name, value in detector(clean, predict).items()}
        return as_rows(values, paths)


def check_needs(detectors: Sequence[Detector]) -> None:
    """See that all ``detectors`` can score pictures.

    Raises:
        InputError: one needs a prompt.
    """
    if unfit := [detector.name for detector in detectors if not isinstance(detector, ImageDetector)]:
        fit = [name for name, cls in DETECTORS.items() if issubclass(cls, ImageDetector)]
        raise InputError(f"{', '.join(unfit)}: scores prompts, not pictures; for --images there is {', '.join(fit)}")
