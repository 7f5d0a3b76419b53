"""The package as a library: what the commands do, with frames and pictures instead of files.

``import memorization as mem`` offers all of it; nothing is written unless ``out`` names a folder.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from torch import Tensor

from memorization.detectors.base import DEFAULT_DETECTORS
from memorization.errors import InputError
from memorization.evaluation.calibration import Calibration, read_calibration
from memorization.evaluation.report import evaluate as all_numbers
from memorization.evaluation.report import numbers
from memorization.evaluation.runs import Run, read_run
from memorization.io.prompts import Listed, listed
from memorization.models.loading import Model, load_model
from memorization.models.offload import Offload
from memorization.models.spec import ModelSpec
from memorization.runs.detect import Scoring, able_detectors, configured_detectors, detect
from memorization.runs.mitigate import (
    Mitigating,
    Prompts,
    configured_mitigation,
    mitigate_list,
    own_pictures,
    prompts_of,
)
from memorization.settings import make

List = str | Path | Sequence[str] | pd.DataFrame  # a file, texts, or a frame with a column "prompt"


def load(
    name: str | Path,
    *,
    device: str = "auto",
    dtype: str | None = None,
    config: str | Path | None = None,
    adapters: Sequence[tuple[str | Path, float]] = (),
    offload: Offload = "none",
) -> Model:
    """Load a model.

    Args:
        name: a name (``python -m memorization models`` lists them), a YAML file of your own, a folder, a hub
            id, or one file in safetensors or GGUF.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:1``, ...
        dtype: ``float32``, ``bfloat16`` or ``float16``; None for the model's own, else by hardware.
        config: where the configs of a model that is one file are, and the other parts where it is a GGUF: a folder in
            diffusers format, or a hub id.
        adapters: LoRAs in safetensors, each with its scale.
        offload: for a model that does not fit the card: networks wait in the machine's memory and come one (``model``)
            or one layer (``group``) at a time.

    Raises:
        InputError: there is no such model, its checkpoint lacks what is needed, or it does not fit.
    """
    return load_model(
        str(name), device=device, dtype=dtype, any_family=True, config=None if config is None else str(config),
        adapters=[(Path(file), float(scale)) for file, scale in adapters], offload=offload,
    )  # fmt: skip


def score(
    model: Model,
    prompts: List,
    *,
    detectors: Sequence[str] = DEFAULT_DETECTORS,
    noises: int = 1,
    settings: Mapping[str, Mapping[str, object]] | None = None,
    calibration: str | Path | None = None,
    out: str | Path | None = None,
    overwrite: bool = False,
    **options,
) -> pd.DataFrame:
    """Score prompts for memorization; higher scores mean memorized.

    Args:
        prompts: a list's file, texts, or a frame with a column ``prompt``; ``label`` (0 or 1), ``family`` and ``split``
            are kept, for :func:`evaluate`.
        detectors: names, or ``["all"]``: all that the model can do.
        noises: a prompt.
        settings: detector -> its settings, over the model's.
        calibration: a file that ``detect_eval.py --calibrate`` wrote, whose settings are taken.
        out: a folder for ``scores.jsonl`` and ``run.json``, where a killed call goes on. The processes of a launch
            make it together, and each is given all rows.
        options: ``seed``, ``steps``, ``guidance_scale``, ``batch_size``, ``sequential``, as
            :class:`~memorization.runs.detect.Scoring`.

    Returns:
        A row a prompt; under each score's name a list with a value a noise.

    Raises:
        InputError: an argument makes no sense, or the model gave a value that is not finite.
    """
    scoring = _options(Scoring, noises=noises, **options)
    known = read_calibration(Path(calibration)) if calibration else Calibration()
    holds_for = {"model": model.name, "num_images": scoring.noises, "steps": scoring.steps}
    chosen = configured_detectors(detectors, settings or {}, model.spec, known, holds_for)
    chosen, _ = able_detectors(model.pipe, chosen, detectors)
    store = detect(model, _listed(prompts), chosen, scoring, calibration=known, out=_path(out),
                   overwrite=overwrite)  # fmt: skip
    frame = pd.DataFrame(store.rows)
    frame.attrs["settings"] = store.record["settings"]
    return frame


def evaluate(scores: pd.DataFrame | str | Path, *, resamples: int = 2000) -> pd.DataFrame:
    """How well scores tell memorized prompts from others.

    Args:
        scores: what :func:`score` gave for a list with labels, or a run's folder.
        resamples: of the bootstrap over families of near-copies.

    Returns:
        A row a score and number of noises: ``detector``, ``noises``, ``auc``, ``auc low``, ``auc high`` (95% interval),
        and the same of ``tpr@1%`` and ``tpr@3%``, the largest TPR at that FPR. Text-only baselines have no noises.

    Raises:
        InputError: there are no labels, or of one class only.
    """
    in_memory = isinstance(scores, pd.DataFrame)
    run = Run(scores, scores.attrs.get("settings")) if in_memory else read_run(Path(scores))
    return numbers(all_numbers(run, resamples))


class Result(NamedTuple):
    """What :func:`mitigate` gives.

    Attributes:
        frame: a row a prompt: ``prompt``, ``new_prompt``, and what was measured, ``..._before`` and ``..._after``.
        before, after: pictures from the same noise, uint8 ``(prompts, noises, h, w, 3)``.
        tensors: of every prompt what the sampler is to be given instead of its own, where that was changed:
            ``prompt_embeds (1, tokens, width)``, ``latents (noises, c, h, w)``.
    """

    frame: pd.DataFrame
    before: np.ndarray
    after: np.ndarray
    tensors: list[dict[str, Tensor]]


def mitigate(
    model: Model,
    prompts: List,
    method: str,
    *,
    settings: Mapping[str, object] | None = None,
    index: str | Path | None = None,
    calibration: str | Path | None = None,
    clip: str | None = None,
    out: str | Path | None = None,
    overwrite: bool = False,
    **options,
) -> Result:
    """Mitigate prompts, all of them unless a ``threshold`` is given.

    Args:
        prompts: a list's file, texts, or a frame with a column ``prompt``. A file's training pictures (column
            ``image``) are measured against.
        method: a mitigation's name.
        settings: of the method, such as ``strength``, over the model's.
        index: of training pictures, for methods that need one.
        calibration: a file that ``detect_eval.py --calibrate`` wrote; None for the model's own.
        clip: checkpoint that judges text alignment; None for the model's own, ``none`` for none.
        out: a folder for lines, pictures and embeddings, where a killed call goes on.
        options: ``noises``, ``seed``, ``steps``, ``guidance_scale``, ``batch_size``, ``threshold``, ``limit``, as
            :class:`~memorization.runs.mitigate.Mitigating`.

    Raises:
        InputError: an argument makes no sense, a calibration is missing, or no prompt is above the threshold.
    """
    spec = model.spec
    plan = _options(Mitigating, **{"threshold": None, **options})
    mitigation = configured_mitigation(method, settings or {}, spec, _path(index))
    path = calibration or spec.calibration
    known = read_calibration(Path(path)) if path else Calibration()
    result = mitigate_list(model, _with_pictures(prompts, spec), mitigation, plan, calibration=known, clip=clip,
                           out=_path(out), overwrite=overwrite)  # fmt: skip
    if result.kept is None:
        raise InputError("no prompt scores at or above the threshold: nothing to mitigate")
    ids = [row["id"] for row in result.rows]
    before, after = (np.stack([result.kept.pictures(i, when) for i in ids]) for when in ("before", "after"))
    return Result(pd.DataFrame(result.rows), before, after, [result.kept.tensors(i) for i in ids])


def _path(name: str | Path | None) -> Path | None:
    return Path(name) if name else None


def _options(cls, **options):
    """Options as the dataclass has them."""
    return make(cls, options, cls.__name__.lower())


def _listed(prompts: List) -> Listed:
    return listed(prompts if isinstance(prompts, (str, Path, pd.DataFrame)) else list(prompts))


def _with_pictures(prompts: List, spec: ModelSpec) -> Prompts:
    if isinstance(prompts, (str, Path)):
        return prompts_of(spec, Path(prompts))
    frame = _listed(prompts).frame
    return Prompts(frame if "picture" in frame else frame.assign(picture=None), own_pictures(spec))
