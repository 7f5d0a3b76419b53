#!/usr/bin/env python
"""Make memorized prompts safe: prompts -> other text, embeddings, noise or guidance, with pictures and measurements.

  python mitigate_mem.py --model testbed-eps                             flagged prompts of the shipped model
  python mitigate_mem.py --model testbed-eps --method rewrite            change the words instead of the embedding
  python mitigate_mem.py --model ./my-model --prompts mine.txt --calibration mine.yaml

Prompts above the calibrated threshold are mitigated (all of them with --all). The output folder gets a line a prompt in
mitigations.jsonl, the pictures before and after from the same noise, the new embeddings, and a contact sheet. A killed
run goes on where it stopped when the same command is given again.
"""

from __future__ import annotations

import argparse
import hashlib
import os
from pathlib import Path

from memorization.errors import ArgumentParser, InputError, run_script

ROOT = Path(__file__).resolve().parent


def parse_arguments() -> argparse.Namespace:
    from memorization.mitigations import MITIGATIONS

    parser = ArgumentParser(description=__doc__, epilog=strengths_of(MITIGATIONS))
    add = parser.add_argument
    # fmt: off
    add("--model", required=True, metavar="NAME|FOLDER|HUB_ID", help="a name from configs/, a folder, or a hub id")
    add("--prompts", type=Path, metavar="FILE", help=".txt, .csv or .jsonl (default: the model's own list)")
    add("--method", default="anisotropy", metavar="NAME", help="see below (default: %(default)s)")
    add("--strength", type=float, metavar="S", help="see below (default: the method's own)")
    add("--calibration", type=Path, metavar="FILE",
        help="written by detect_eval.py --calibrate (default: the model's own)")
    add("--threshold", default="auto", metavar="X|auto",
        help="anisotropy score from which on a prompt is mitigated (default: the calibrated one)")
    add("--all", action="store_true", help="mitigate every prompt, whatever its score")
    add("--num-images", type=int, metavar="N", help="noises a prompt (default: as calibrated)")
    add("--seed", type=int, default=51, help="of the noise (default: %(default)s)")
    add("--steps", type=int, default=50, help="of a generation (default: %(default)s)")
    add("--guidance-scale", type=float, metavar="S", help="default: the model's config, else 7.5")
    add("--dtype", choices=["float32", "bfloat16", "float16"], help="default: the model's config, else by hardware")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, ... (default: %(default)s)")
    add("--limit", type=int, metavar="N", help="the first N of these prompts")
    add("--out", type=Path, metavar="DIR", help="default: results/local/<model>-<method>")
    add("--overwrite", action="store_true", help="start anew in a folder that holds a run")
    # fmt: on
    args = parser.parse_args()
    if (args.num_images is not None and args.num_images < 1) or not 3 <= args.steps <= 500:
        parser.error("--num-images is at least 1, --steps from 3 to 500")
    return args


def strengths_of(mitigations: dict) -> str:
    """The methods and their strengths, for --help."""
    lines = [
        f"  {name:20} strength {cls.strength:g}; from mild to strong: {', '.join(f'{s:g}' for s in cls.strengths)}"
        for name, cls in mitigations.items()
    ]
    return "methods (docs/mitigations.md says what each does and what its strength means):\n" + "\n".join(lines)


def report(rows: list[dict], out: Path, copy: dict[str, float], sheet: Path) -> None:
    """Print the changed prompts, the means before and after, and where everything is."""
    for row in rows:
        if row["new_prompt"] != row["prompt"]:
            print(
                f"  {row['score_before']:8.4g} -> {row['score_after']:8.4g}  {marked(row['prompt'], row['new_prompt'])}"
            )
    print(summary(rows, copy))
    print(f"{len(rows)} prompts: {os.path.relpath(out)}/mitigations.jsonl, images/, embeds/, {sheet.name}")


def marked(old: str, new: str) -> str:
    """The new prompt, with what was taken out and put in: ``a [-red-] {+blue+} kite``."""
    from difflib import SequenceMatcher

    left, right, parts = old.split(), new.split(), []
    for kind, i, j, k, n in SequenceMatcher(a=left, b=right, autojunk=False).get_opcodes():
        if kind == "equal":
            parts += left[i:j]
            continue
        parts += [f"[-{' '.join(left[i:j])}-]"] * (j > i) + [f"{{+{' '.join(right[k:n])}+}}"] * (n > k)
    return " ".join(parts)


def summary(rows: list[dict], copy: dict[str, float]) -> str:
    """Means before and after, as a table; with the share of pictures below each limit of ``copy``."""
    import numpy as np
    import pandas as pd

    from memorization.tables import markdown

    found = []
    names = {"score": "anisotropy", "nl2": "nL2 to the training picture", "sscd": "SSCD to it", "clip": "CLIP score"}
    for key, name in names.items():
        pairs = [(row[f"{key}_before"], row[f"{key}_after"]) for row in rows if f"{key}_before" in row]
        if pairs:
            before, after = (np.concatenate([np.atleast_1d(pair[i]) for pair in pairs]) for i in (0, 1))
            found.append({"measure": name, "before": f"{before.mean():.3f}", "after": f"{after.mean():.3f}"})
            if key in copy:
                below = [f"{(values < copy[key]).mean():.1%}" for values in (before, after)]
                found.append({"measure": f"pictures with {key} < {copy[key]:g}", "before": below[0], "after": below[1]})
    return markdown(pd.DataFrame(found))


def picture_files(frame, listed: Path) -> list[Path | None]:
    """The training picture of each row, by its column ``image``: beside the list or in the project.

    Raises:
        InputError: a file is not there.
    """
    found = []
    for name in frame["image"] if "image" in frame else [""] * len(frame):
        places = [folder / str(name) for folder in (listed.parent, ROOT)] if name else []
        path = next((place for place in places if place.is_file()), None)
        if name and path is None:
            raise InputError(f"{listed}: training picture {name} is not there")
        found.append(path)
    return found


def flagged(case_of, prompts: list[str], threshold: float, at_once: int) -> list[bool]:
    """Which prompts score at or above ``threshold``."""
    import torch
    from tqdm import tqdm

    from memorization.mitigation import SCORED_BY

    scores = []
    with torch.no_grad():
        for start in tqdm(range(0, len(prompts), at_once), desc="score", disable=len(prompts) < at_once):
            case = case_of(prompts[start : start + at_once])
            scores += case.score(SCORED_BY, case.embeds).tolist()
    return [score >= threshold for score in scores]


def main() -> None:
    args = parse_arguments()
    # Imports that take seconds come after the arguments are known to be good.
    import diffusers
    import torch
    import transformers

    for library in (diffusers, transformers):
        library.logging.set_verbosity_error()
        library.logging.disable_progress_bar()
    from memorization.calibration import Calibration, read_calibration
    from memorization.detection import default_batch_size
    from memorization.detectors import make_detectors
    from memorization.mitigation import SCORED_BY, contact_sheet, run_mitigation
    from memorization.mitigations import Case, make_mitigation
    from memorization.models import find_model, load_pipeline, pick_device, pick_dtype, revision_of
    from memorization.prompts import read_prompts
    from memorization.results import ResultStore, read_lines
    from memorization.similarity.clip import Clip
    from memorization.similarity.judge import Judge
    from memorization.similarity.sscd import SSCD, find_weights

    spec, mitigation = find_model(args.model), make_mitigation(args.method, args.strength)
    path = args.calibration or (ROOT / spec.calibration if spec.calibration else None)
    calibration = read_calibration(path) if path else Calibration()
    images = args.num_images or calibration.holds_for.get("num_images", 4)
    calibration.check({"model": args.model, "num_images": images})
    threshold = threshold_of(args, calibration, SCORED_BY)

    listed = args.prompts or (ROOT / spec.prompts["prompts"] if "prompts" in spec.prompts else None)
    if listed is None:
        raise InputError(f"model {spec.name!r} has no list of its own: give --prompts FILE")
    frame = read_prompts(listed)
    frame["picture"] = picture_files(frame, listed)
    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype or spec.dtype, device)
    pipe = load_pipeline(spec, dtype, device, images=True)
    detectors = make_detectors(
        ["anisotropy", "noise_norm"], {"anisotropy": {**spec.anisotropy, **calibration.anisotropy}}
    )
    guidance_scale = spec.guidance_scale if args.guidance_scale is None else args.guidance_scale
    batch_size, noise = default_batch_size(pipe), pipe.pure_noise(images, args.seed)

    def case_of(prompts: list[str]) -> Case:
        with torch.no_grad():
            embeds = pipe.embed(prompts).float()
        return Case(
            pipe, prompts, embeds, noise, {d.name: d for d in detectors}, calibration.levels, args.steps,
            calibration.holds_for.get("steps", 50), guidance_scale, args.seed, batch_size,
        )  # fmt: skip

    at_once = max(1, batch_size // images)
    known = [picture for picture in frame["picture"] if picture]
    if threshold is not None:
        frame = frame[flagged(case_of, frame["prompt"].tolist(), threshold, at_once)].reset_index(drop=True)
    frame = frame[: args.limit]
    if frame.empty:
        print("no prompt scores at or above the threshold: nothing to mitigate")
        return
    settings = {
        "model": args.model, "revision": revision_of(pipe), "method": args.method, **vars(mitigation),
        "prompts": hashlib.sha256("\n".join(frame["prompt"]).encode()).hexdigest(), "num_images": images,
        "seed": args.seed, "steps": args.steps, "guidance_scale": guidance_scale, "dtype": dtype,
        "anisotropy": vars(detectors[0]), "threshold": threshold,
    }  # fmt: skip
    size = pipe.unet.config.sample_size * pipe.vae_scale_factor
    judge = Judge(
        known, (size, size), Clip(spec.clip, device) if spec.clip else None, SSCD() if find_weights() else None
    )
    out = args.out or ROOT / "results" / "local" / f"{spec.name}-{args.method}"
    with ResultStore(out, settings, {"device": str(device)}, args.overwrite, name="mitigations.jsonl") as store:
        run_mitigation(case_of, mitigation, frame, judge, store, at_once=at_once)
    rows, _ = read_lines(out / "mitigations.jsonl")
    report(rows, out, spec.copy_limits, contact_sheet(out, rows, frame["picture"].tolist(), out / "contact_sheet.png"))


def threshold_of(args: argparse.Namespace, calibration, detector: str) -> float | None:
    """The score from which on a prompt is mitigated; None for all of them.

    Raises:
        InputError: there is no calibration to take it from, or it is no number.
    """
    if args.all:
        return None
    if args.threshold != "auto":
        try:
            return float(args.threshold)
        except ValueError:
            raise InputError(f"--threshold {args.threshold}: a number, or auto") from None
    if detector not in calibration.thresholds:
        raise InputError(
            "no calibrated threshold: give --calibration FILE (by detect_eval.py --calibrate), --threshold X or --all"
        )
    return calibration.thresholds[detector]


if __name__ == "__main__":
    run_script(main)
