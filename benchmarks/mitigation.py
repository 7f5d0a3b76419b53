#!/usr/bin/env python
"""Seconds a prompt of every mitigation at its default strength and of the generation under it, beside plain generation.

python benchmarks/mitigation.py                     8 memorized prompts of testbed-eps, 4 noises, 50 steps
python benchmarks/mitigation.py --model testbed-v --methods anisotropy,sail
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pandas as pd
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from memorization.calibration import read_calibration  # noqa: E402
from memorization.detection import default_batch_size  # noqa: E402
from memorization.detectors import make_detectors  # noqa: E402
from memorization.errors import ArgumentParser, run_script  # noqa: E402
from memorization.index import own_index  # noqa: E402
from memorization.mitigations import MITIGATIONS, Case, Remedy, make_mitigation  # noqa: E402
from memorization.models import find_model, load_pipeline, pick_device, pick_dtype  # noqa: E402
from memorization.prompts import read_prompts  # noqa: E402
from memorization.sampling import sample  # noqa: E402
from memorization.tables import markdown  # noqa: E402


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="testbed-eps")
    parser.add_argument("--prompts", type=int, default=8, metavar="N")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--methods", default=",".join(MITIGATIONS))
    args = parser.parse_args()
    spec, device = find_model(args.model), pick_device()
    pipe = load_pipeline(spec, pick_dtype(spec.dtype, device), device, images=True)
    calibration = read_calibration(ROOT / spec.calibration)
    frame = read_prompts(ROOT / spec.prompts["prompts"])
    prompts = frame[frame["label"] == 1]["prompt"].tail(args.prompts).tolist()
    detectors = make_detectors(["anisotropy", "noise_norm"], {"anisotropy": spec.anisotropy})
    with torch.no_grad():
        embeds = pipe.embed(prompts).float()
    case = Case(
        pipe, prompts, embeds, pipe.pure_noise(4, 51), {d.name: d for d in detectors}, calibration.levels, args.steps,
        guidance_scale=spec.guidance_scale, batch_size=default_batch_size(pipe),
    )  # fmt: skip
    amg = {**spec.amg, "index": str(own_index(spec))}

    def timed(work):
        started = time.perf_counter()
        return work(), (time.perf_counter() - started) / len(prompts)

    sample(case, Remedy.unchanged(case))  # warm
    plain = timed(lambda: sample(case, Remedy.unchanged(case)))[1]
    rows = []
    for name in args.methods.split(","):
        remedy, search = timed(lambda name=name: make_mitigation(name, amg if name == "amg" else {})(case))
        generation = timed(lambda remedy=remedy: sample(case, remedy))[1]
        rows.append({"method": name, "remedy, s": search, "generation, s": generation,
                     "together / plain": (search + generation) / plain})  # fmt: skip
        print(name, f"{search:.2f} + {generation:.2f}", file=sys.stderr)
    print(f"plain generation: {plain:.2f} s a prompt of 4 pictures, {args.steps} steps\n")
    print(markdown(pd.DataFrame(rows).round(2)))


if __name__ == "__main__":
    run_script(main)
