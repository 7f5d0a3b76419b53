#!/usr/bin/env python
"""Seconds a prompt of every mitigation at its default strength and of the generation under it, beside plain generation.

python benchmarks/mitigation.py                     8 memorized prompts of testbed-eps, 4 noises, 50 steps
python benchmarks/mitigation.py --model testbed-v --methods anisotropy,sail
python benchmarks/mitigation.py --sheet sheet.png   and a contact sheet: training picture | plain | every method
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from memorization.errors import InputError  # noqa: E402
from memorization.evaluation.calibration import read_calibration  # noqa: E402
from memorization.flags import ArgumentParser, run_script  # noqa: E402
from memorization.io.figures import save_figure  # noqa: E402
from memorization.io.pictures import read_picture  # noqa: E402
from memorization.io.prompts import picture_files, read_prompts  # noqa: E402
from memorization.io.tables import markdown  # noqa: E402
from memorization.mitigations.base import MITIGATIONS  # noqa: E402
from memorization.mitigations.case import Remedy  # noqa: E402
from memorization.models.devices import pick_device, pick_dtype  # noqa: E402
from memorization.models.loading import load_pipeline  # noqa: E402
from memorization.models.spec import find_model  # noqa: E402
from memorization.runs.cases import Cases, scoring_detectors  # noqa: E402
from memorization.runs.memory import default_batch_size  # noqa: E402
from memorization.runs.mitigate import configured_mitigation  # noqa: E402
from memorization.runs.sampling import sample  # noqa: E402


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="testbed-eps")
    parser.add_argument("--prompts", type=int, default=8, metavar="N")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--sheet", type=Path, metavar="FILE")
    parser.add_argument("--methods", default=",".join(MITIGATIONS))
    args = parser.parse_args()
    spec, device = find_model(args.model), pick_device()
    if not (spec.calibration and "prompts" in spec.prompts):
        raise InputError(f"{spec.name}: needs a calibration and a list with training pictures in its config")
    pipe = load_pipeline(spec, pick_dtype(spec.dtype, device), device, pictures=True)
    calibration = read_calibration(ROOT / spec.calibration)
    frame = read_prompts(ROOT / spec.prompts["prompts"])
    frame["picture"] = picture_files(frame, ROOT / spec.prompts["prompts"])
    chosen = frame[(frame["label"] == 1) & frame["picture"].notna()].tail(args.prompts)
    prompts = chosen["prompt"].tolist()
    methods = {name: configured_mitigation(name, {}, spec) for name in args.methods.split(",")}
    case = Cases(
        pipe, pipe.pure_noise(4, 51), args.steps, spec.scale, 51, default_batch_size(pipe),
        scoring_detectors(methods.values(), spec, calibration), calibration.levels,
    )(prompts)  # fmt: skip

    def timed(work):
        started = time.perf_counter()
        return work(), (time.perf_counter() - started) / len(prompts)

    sample(case, Remedy.unchanged(case))  # warm
    pictures, plain = timed(lambda: sample(case, Remedy.unchanged(case)))
    rows, columns = [], {"plain": pictures}
    for name, mitigation in methods.items():
        remedy, search = timed(lambda mitigation=mitigation: mitigation(case))
        columns[name], generation = timed(lambda remedy=remedy: sample(case, remedy))
        rows.append({"method": name, "remedy, s": search, "generation, s": generation,
                     "together / plain": (search + generation) / plain})  # fmt: skip
        print(name, f"{search:.2f} + {generation:.2f}", file=sys.stderr)
    print(f"plain generation: {plain:.2f} s a prompt of 4 pictures, {args.steps} steps\n")
    print(markdown(pd.DataFrame(rows).round(2)))
    if args.sheet:
        training = np.stack([read_picture(file, pictures.shape[2:4]) for file in chosen["picture"]])
        draw({"training": training, **{name: made[:, 0] for name, made in columns.items()}}, prompts, args.sheet)


def draw(columns: dict[str, np.ndarray], prompts: list[str], path: Path, gap: int = 4) -> None:
    """A row a prompt, a column a method: uint8 ``(prompts, h, w, 3)`` each."""
    padded = [
        np.pad(pictures, ((0, 0), (0, 0), (0, gap), (0, 0)), constant_values=255) for pictures in columns.values()
    ]
    rows, width = np.concatenate(padded, axis=2), padded[0].shape[2]
    figure, axes = plt.subplots(len(rows), 1, figsize=(len(columns), 1.25 * len(rows)), squeeze=False)
    for axis, row, prompt in zip(axes[:, 0], rows, prompts, strict=True):
        axis.imshow(row)
        axis.set_title(prompt, fontsize=8, loc="left", pad=2, parse_math=False)
        axis.axis("off")
    for i, name in enumerate(columns):
        axes[0, 0].text((i + 0.5) * width, -14, name.replace("_", "\n"), fontsize=8, ha="center", va="bottom")
    save_figure(figure, path)


if __name__ == "__main__":
    run_script(main)
