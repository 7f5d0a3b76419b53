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
import math
import os
from pathlib import Path

from memorization.errors import InputError
from memorization.flags import ArgumentParser, run_script

ROOT = Path(__file__).resolve().parent
SCORED_BY = "anisotropy"


def parse_arguments() -> argparse.Namespace:
    from memorization.mitigations.registry import MITIGATIONS

    parser = ArgumentParser(description=__doc__, epilog=strengths_of(MITIGATIONS))
    add = parser.add_argument
    # fmt: off
    add("--model", required=True, metavar="NAME|FOLDER|HUB_ID", help="a name in memorization/configs, folder or hub id")
    add("--prompts", type=Path, metavar="FILE", help=".txt, .csv or .jsonl (default: the model's own list)")
    add("--method", default="anisotropy", metavar="NAME", help="see below (default: %(default)s)")
    add("--strength", type=float, metavar="S", help="see below (default: the method's own)")
    add("--set", action="append", default=[], metavar="SETTING=VALUE", dest="assignments",
        help="another setting of the method, as in target=3 (the score to stop at) or lr=0.1; may be repeated")
    add("--index", type=Path, metavar="DIR",
        help="of training pictures, for amg (default: of the pictures that the model's own list names)")
    add("--calibration", metavar="FILE|none",
        help="written by detect_eval.py --calibrate: threshold and levels (default: the model's own)")
    add("--threshold", default="auto", metavar="X|auto",
        help="anisotropy score from which on a prompt is mitigated (default: the calibrated one)")
    add("--all", action="store_true", help="mitigate every prompt, whatever its score")
    add("--limit", type=int, metavar="N", help="the first N of these prompts")
    add("--num-images", type=int, metavar="N", help="noises a prompt (default: as calibrated, else 4)")
    add("--seed", type=int, default=51, help="of the noise (default: %(default)s)")
    add("--steps", type=int, default=50, help="of a generation (default: %(default)s)")
    add("--guidance-scale", type=float, metavar="S", help="default: the model's config, else 7.5")
    add("--clip", metavar="FOLDER|HUB_ID|none", help="judges text alignment (default: the model's config)")
    add("--sscd", default="official-288", metavar="PRESET",
        help="how SSCD is given pictures: see memorization/similarity/sscd.py (default: %(default)s)")
    add("--dtype", choices=["float32", "bfloat16", "float16"], help="default: the model's config, else by hardware")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, ... (default: %(default)s)")
    add("--batch-size", type=int, metavar="N", help="rows to a UNet call, halved on out of memory (default: by device)")
    add("--out", type=Path, metavar="DIR", help="default: results/local/<model>-<method>")
    add("--overwrite", action="store_true", help="start anew in a folder that holds a run")
    # fmt: on
    args = parser.parse_args()
    for name in ("num_images", "limit", "batch_size"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} is at least 1")
    if not 3 <= args.steps <= 500 or not 0 <= args.seed < 2**63:
        parser.error("--steps is from 3 to 500, --seed from 0 to 2^63 - 1")
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

    from memorization.io.tables import markdown

    found = []
    names = {"score": "anisotropy", "nl2": "nL2 to the training picture", "sscd": "SSCD to it", "clip": "CLIP score"}
    for key, name in names.items():
        pairs = [(row[f"{key}_before"], row[f"{key}_after"]) for row in rows if f"{key}_after" in row]
        if pairs:
            before, after = (np.concatenate([np.atleast_1d(pair[i]) for pair in pairs]) for i in (0, 1))
            found.append({"measure": name, "before": f"{before.mean():.3f}", "after": f"{after.mean():.3f}"})
            if key in copy:
                below = [f"{(values < copy[key]).mean():.1%}" for values in (before, after)]
                found.append({"measure": f"pictures with {key} < {copy[key]:g}", "before": below[0], "after": below[1]})
    return markdown(pd.DataFrame(found))


def threshold_of(args: argparse.Namespace, calibration) -> float | None:
    """The score from which on a prompt is mitigated; None for all of them.

    Raises:
        InputError: there is no calibration to take it from, or it is no number.
    """
    if args.all:
        return None
    if args.threshold != "auto":
        try:
            threshold = float(args.threshold)
        except ValueError:
            threshold = math.nan
        if math.isnan(threshold):
            raise InputError(f"--threshold {args.threshold}: a number, or auto")
        return threshold
    if SCORED_BY not in calibration.thresholds:
        raise InputError(
            "no calibrated threshold: give --calibration FILE (by detect_eval.py --calibrate), --threshold X or --all"
        )
    return calibration.thresholds[SCORED_BY]


def calibrated(args: argparse.Namespace, spec, mitigation) -> tuple:
    """(calibration, number of noises, threshold or None, score to reach or None), before anything is loaded.

    Raises:
        InputError: what is needed of the calibration is not there, or holds for something else.
    """
    from memorization.evaluation.calibration import Calibration, read_calibration
    from memorization.mitigations.case import level_of

    path = args.calibration or spec.calibration
    calibration = read_calibration(ROOT / path) if path and path != "none" else Calibration()
    images = args.num_images or calibration.holds_for.get("num_images", 4)
    threshold = threshold_of(args, calibration)
    to_level = getattr(mitigation, "lowers", None) and mitigation.target is None
    level = level_of(calibration.levels, mitigation) if to_level else None
    if to_level or (args.threshold == "auto" and not args.all):
        calibration.check({"model": args.model, "num_images": images})
    return calibration, images, threshold, level


def method_of(args: argparse.Namespace, spec):
    """The mitigation that the flags name.

    Raises:
        InputError: there is none such.
    """
    import yaml

    from memorization.index.build import own_index
    from memorization.mitigations.registry import make_mitigation

    settings = dict(spec.amg) if args.method == "amg" else {}
    if args.strength is not None:
        settings["strength"] = args.strength
    for assignment in args.assignments:
        name, _, value = assignment.partition("=")
        if not value:
            raise InputError(f"--set {assignment}: write SETTING=VALUE")
        settings[name] = yaml.safe_load(value)
    if args.method == "amg":
        if args.index or "index" not in settings:
            settings["index"] = str(args.index or own_index(spec))
    elif args.index:
        raise InputError(f"--index is for amg, not {args.method}")
    return make_mitigation(args.method, settings)


def flagged(case_of, prompts: list[str], threshold: float, at_once: int) -> list[bool]:
    """Which prompts score at or above ``threshold``."""
    from tqdm import tqdm

    from memorization.mitigations.case import Remedy
    from memorization.runs.mitigate import scores_of

    scores = []
    for start in tqdm(range(0, len(prompts), at_once), desc="score", disable=len(prompts) <= at_once):
        case = case_of(prompts[start : start + at_once])
        scores += scores_of(case, Remedy.unchanged(case))
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
    from memorization.detectors.registry import make_detectors
    from memorization.io.files import read_lines
    from memorization.mitigations.case import Case
    from memorization.models.devices import pick_device, pick_dtype
    from memorization.models.loading import load_pipeline, revision_of
    from memorization.models.registry import find_model
    from memorization.runs.memory import default_batch_size
    from memorization.runs.mitigate import contact_sheet, run_mitigation
    from memorization.runs.store import ResultStore
    from memorization.similarity.judge import make_judge

    spec = find_model(args.model)
    mitigation = method_of(args, spec)
    calibration, images, threshold, level = calibrated(args, spec, mitigation)
    frame, known = read_list(args, spec)

    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype or spec.dtype, device)
    if dtype == "float16" and hasattr(mitigation, "lowers"):
        raise InputError(f"{args.method}: gradients are lost in float16; give --dtype float32 or bfloat16")
    pipe = load_pipeline(spec, dtype, device, pictures=True)
    if device.type == "cuda":
        pipe.unet.enable_gradient_checkpointing()  # acts where gradients are asked for alone
    anisotropy = {**spec.anisotropy, **calibration.anisotropy}
    detectors = make_detectors(["anisotropy", "noise_norm"], {"anisotropy": anisotropy})
    guidance_scale = spec.guidance_scale if args.guidance_scale is None else args.guidance_scale
    default_size, noise = args.batch_size or default_batch_size(pipe), pipe.pure_noise(images, args.seed)

    def case_of(prompts: list[str], batch_size: int = default_size) -> Case:
        with torch.no_grad():
            embeds = pipe.embed(prompts).float()
        return Case(
            pipe, prompts, embeds, noise, {d.name: d for d in detectors}, calibration.levels, args.steps,
            calibration.holds_for.get("steps", 50), guidance_scale, args.seed, batch_size,
        )  # fmt: skip

    if threshold is not None:
        above = flagged(case_of, frame["prompt"].tolist(), threshold, max(1, default_size // images))
        frame = frame[above].reset_index(drop=True)
    frame = frame[: args.limit]
    if frame.empty:
        print("no prompt scores at or above the threshold: nothing to mitigate")
        return
    judge = make_judge(pipe, known, spec.clip if args.clip is None else args.clip, args.sscd)
    settings = {
        "model": args.model, "revision": revision_of(pipe), "method": args.method, **vars(mitigation),
        **(mitigation.record() if args.method == "amg" else {}),
        "level": level, "threshold": threshold,
        "prompts": hashlib.sha256("\n".join(frame["prompt"]).encode()).hexdigest(), "num_images": images,
        "seed": args.seed, "steps": args.steps, "grid_steps": calibration.holds_for.get("steps", 50),
        "guidance_scale": guidance_scale, "dtype": dtype, "batch_size": default_size, "anisotropy": vars(detectors[0]),
        "judge": judge.description,
    }  # fmt: skip
    out = args.out or ROOT / "results" / "local" / f"{spec.name}-{args.method}"
    with ResultStore(out, settings, {"device": str(device)}, args.overwrite, name="mitigations.jsonl") as store:
        run_mitigation(case_of, mitigation, frame, judge, store, batch_size=default_size, noises=images)
    rows, _ = read_lines(out / "mitigations.jsonl")
    sheet = contact_sheet(out, rows, frame["picture"].tolist(), images, out / "contact_sheet.png")
    report(rows, out, spec.copy_limits, sheet)


def read_list(args: argparse.Namespace, spec) -> tuple:
    """The prompts with their training pictures (column ``picture``), and every training picture that is known.

    Raises:
        InputError: there is no list.
    """
    from memorization.io.prompts import picture_files, read_prompts

    own = ROOT / spec.prompts["prompts"] if "prompts" in spec.prompts else None
    if args.prompts is None and own is None:
        raise InputError(f"model {spec.name!r} has no list of its own: give --prompts FILE")
    frame = read_prompts(args.prompts or own)
    frame["picture"] = picture_files(frame, args.prompts or own)
    known = [picture for picture in frame["picture"] if picture]
    if own and own != args.prompts:
        known += [picture for picture in picture_files(read_prompts(own), own) if picture]
    return frame, known


if __name__ == "__main__":
    run_script(main)
