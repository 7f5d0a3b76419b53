#!/usr/bin/env python
"""Score prompts for memorization: prompt list -> results/<run>/scores.jsonl, a line a prompt.

  python detect_mem.py --model testbed-eps                          the shipped model and its prompt list
  python detect_mem.py --model sd14                                 Stable Diffusion 1.4 and the paper's lists
  python detect_mem.py --model ./my-model --prompts my_prompts.txt  your own checkpoint and prompts

A killed run goes on where it stopped when the same command is given again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
from functools import partial
from pathlib import Path

import yaml

from memorization.detectors.anisotropy import COSINE_MODES
from memorization.errors import InputError
from memorization.flags import ArgumentParser, run_script

ROOT = Path(__file__).resolve().parent
ANISOTROPY_FLAGS = ("variant", "cosine_mode", "cosine", "normalization")


def parse_arguments() -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__)
    add = parser.add_argument
    # fmt: off
    add("--model", required=True, metavar="NAME|FOLDER|HUB_ID", help="a name in memorization/configs, folder or hub id")
    add("--prompts", metavar="FILE", help=".txt, .csv or .jsonl (column prompt or caption; optional label, family)")
    add("--memorized", metavar="FILE", help="a list whose prompts all count as memorized; needs --non-memorized")
    add("--non-memorized", metavar="FILE", help="a list whose prompts all count as not memorized")
    add("--images", type=Path, metavar="DIR",
        help="score pictures, by the detectors that need a picture; a metadata.jsonl may give prompts and labels")
    add("--detectors", metavar="A,B|all", help="default: anisotropy,noise_norm, and p_laplace for --images")
    add("--num-images", type=int, default=1, metavar="N", help="noises per prompt (default: %(default)s)")
    add("--seed", type=int, default=51, help="of the noise (default: %(default)s, the public code's)")
    add("--set", action="append", default=[], metavar="DETECTOR.SETTING=VALUE", dest="assignments",
        help="a detector's setting by its name in docs/detectors.md, as in p_laplace.timestep=50; may be repeated")
    add("--steps", type=int, default=50, help="of the DDIM grid that places the timesteps (default: %(default)s)")
    add("--guidance-scale", type=float, metavar="S",
        help="of the generation that some detectors read (default: the model's config, else 7.5)")
    add("--variant", choices=["official", "eps"],
        help="official: the public code's numbers; eps: one meaning for every prediction type (default: official)")
    add("--cosine-mode", choices=COSINE_MODES,
        help="x,c|x: cos(eps_u, d); x,x|c: cos(eps_u, eps_c); x|c,c|x: cos(eps_c, d) (default: x,c|x)")
    add("--cosine", choices=["pixel", "vector"],
        help="over the channels of each latent pixel, then averaged, or over the whole latent (default: pixel)")
    add("--normalization", choices=["None", "L1", "L2"],
        help="divide each noise prediction by its norm first (default: None)")
    add("--sequential", action="store_true",
        help="1, 2, 4, 8 noises, more for undecided prompts alone; needs a --calibration made with --num-images 8")
    add("--explain", action="store_true",
        help="print, and draw to tokens.png, which tokens trigger the flagged prompts (else the ten highest)")
    add("--measure-costs", action="store_true", help="write each detector's cost alone, by four prompts, to costs.json")
    add("--calibration", metavar="FILE",
        help="written by detect_eval.py --calibrate: thresholds, and the settings they hold for")
    add("--dtype", choices=["float32", "bfloat16", "float16"],
        help="default: the model's config, else bfloat16 where the hardware has it")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, ... (default: %(default)s)")
    add("--batch-size", default="auto", metavar="N|auto",
        help="rows (prompt x noise) to a UNet call, halved on out of memory (default: auto)")
    add("--out", type=Path, metavar="DIR", help="default: results/local/<model>")
    add("--overwrite", action="store_true", help="start anew in a folder that holds a run")
    # fmt: on
    args = parser.parse_args()
    args.detectors = (args.detectors or ("p_laplace" if args.images else "anisotropy,noise_norm")).split(",")
    if args.sequential:
        if not args.calibration:
            parser.error("--sequential needs --calibration FILE, made with --num-images 8")
        args.num_images = 8
    if args.images and (args.prompts or args.memorized or args.explain or args.sequential or args.measure_costs):
        parser.error("--images goes without prompt lists, --explain, --sequential and --measure-costs")
    if args.guidance_scale is not None and args.guidance_scale < 0:
        parser.error("--guidance-scale is at least 0")
    if args.num_images < 1 or not 3 <= args.steps <= 500 or not 0 <= args.seed < 2**63:
        parser.error("--num-images is at least 1, --steps from 3 to 500, --seed from 0 to 2^63 - 1")
    if args.batch_size != "auto" and not (args.batch_size.isdigit() and int(args.batch_size) > 0):
        parser.error(f"--batch-size {args.batch_size}: a whole number above 0, or auto")
    if bool(args.memorized) != bool(args.non_memorized) or (args.memorized and args.prompts):
        parser.error("give either --prompts, or --memorized and --non-memorized")
    return args


def read_prompt_lists(args: argparse.Namespace, spec) -> tuple:
    """The prompts and what tells them apart from other lists: ``(frame, {role: sha256})``."""
    from memorization.io.prompts import near_copy_families, read_pair, read_prompts

    chosen = {"prompts": args.prompts, "memorized": args.memorized, "non_memorized": args.non_memorized}
    chosen = {key: path for key, path in chosen.items() if path}
    if not chosen:
        chosen = {key: ROOT / path for key, path in spec.prompts.items()}
        if not chosen:
            raise InputError(f"model {spec.name!r} has no prompt list of its own: give --prompts FILE")
        if missing := [path for path in chosen.values() if not path.exists()]:
            made_by = "memorization.prompts fetch" if "published" in missing[0].parts else "testbed.verify"
            raise InputError(f"{missing[0]}: not there yet; it comes from python -m {made_by}")
    if "prompts" in chosen:
        frame = read_prompts(chosen["prompts"])
    else:
        frame = read_pair(chosen["memorized"], chosen["non_memorized"])
    if "label" in frame and ("family" not in frame or not frame["family"].map(bool).all()):
        frame["family"] = near_copy_families(frame["prompt"].tolist())
    hashes = {role: hashlib.sha256(Path(path).read_bytes()).hexdigest() for role, path in chosen.items()}
    return frame, hashes


def report(frame, pipe) -> None:
    """What a user should know of the list, on standard error."""
    from memorization.runs.detect import count_long_prompts

    prompts = frame["prompt"].tolist()
    notes = {
        "blank lines skipped": frame.attrs.get("blank_lines", 0),
        "duplicated prompts": len(prompts) - len(set(prompts)),
        f"prompts over {pipe.tokenizer.model_max_length} tokens (cut off)": count_long_prompts(pipe, prompts),
    }
    said = [f"{count} {what}" for what, count in notes.items() if count]
    print(f"{len(prompts)} prompts" + (": " + ", ".join(said) if said else ""), file=sys.stderr)


def asked_of_anisotropy(args: argparse.Namespace) -> dict:
    """Settings of the anisotropy detector that were given as flags."""
    return {key: getattr(args, key) for key in ANISOTROPY_FLAGS if getattr(args, key) is not None}


def assigned(args: argparse.Namespace, settings: dict[str, dict]) -> dict[str, dict]:
    """Settings of the detectors, those of ``--set`` over ``settings``."""
    for assignment in args.assignments:
        name, _, value = assignment.partition("=")
        detector, _, setting = name.partition(".")
        if not value or not setting or not {detector, "all"} & set(args.detectors):
            raise InputError(f"--set {assignment}: write DETECTOR.SETTING=VALUE, of a detector that --detectors names")
        settings.setdefault(detector, {})[setting] = yaml.safe_load(value)
    return settings


def print_summary(store, first: str | None, thresholds: dict[str, float]) -> None:
    """Where the scores are, and the prompts or pictures that score highest by ``first``."""
    from memorization.evaluation.metrics import noise_mean
    from memorization.io.files import read_lines

    rows, _ = read_lines(store.scores)
    if first is None:
        print(f"scores: {store.scores}")
        return
    score = {row["id"]: noise_mean(row[first]) for row in rows}
    threshold = thresholds.get(first)
    top = sorted(rows, key=lambda row: -score[row["id"]])
    if threshold is not None:
        flagged = sum(value >= threshold for value in score.values())
        print(f"{flagged} of {len(rows)} prompts are flagged ({first} >= {threshold:.4g}). The highest:")
    else:
        print(f"Highest {first} of {len(rows)} prompts:")
    for row in top[:10]:
        mark = "*" if threshold is not None and score[row["id"]] >= threshold else " "
        print(f" {mark} {score[row['id']]:9.4g}  {row.get('image', row['prompt'])[:100]}")
    print(f"scores: {store.scores}")
    if "label" in rows[0]:
        print(f"next:   python detect_eval.py {os.path.relpath(store.folder)}")


def read_images(args: argparse.Namespace, detectors: list) -> tuple:
    """The pictures of ``--images`` and what tells them apart from others: ``(frame, {"images": sha256})``."""
    from memorization.io.pictures import list_pictures

    if unfit := [detector.name for detector in detectors if detector.needs != "image"]:
        raise InputError(f"{', '.join(unfit)}: scores prompts, not pictures; for --images there is p_laplace")
    frame = list_pictures(args.images)
    if "label" in frame and "family" not in frame:
        frame["family"] = [Path(path).name for path in frame["image"]]
    digest = hashlib.sha256(frame.to_csv().encode())
    for path in frame["image"]:
        digest.update(Path(path).read_bytes())
    return frame, {"images": digest.hexdigest()}


def explain(args: argparse.Namespace, pipe, store, first: str, thresholds: dict[str, float]) -> None:
    """Print and draw which tokens trigger the flagged prompts, or the ten highest where there is no threshold."""
    import torch
    from tqdm import tqdm

    from memorization.detectors.explain import as_text, draw_significance, token_significance
    from memorization.evaluation.metrics import noise_mean
    from memorization.io.files import read_lines

    rows = sorted(read_lines(store.scores)[0], key=lambda row: -noise_mean(row[first]))
    chosen = [row for row in rows if noise_mean(row[first]) >= thresholds[first]] if first in thresholds else rows[:10]
    latents, t = pipe.pure_noise(args.num_images, args.seed), pipe.detection_timesteps(args.steps)[0]
    with torch.no_grad():
        uncond = pipe.predict_uncond(latents, [t]).eps[t]
    explained = [token_significance(pipe, row["prompt"], latents, t, uncond) for row in tqdm(chosen, desc="explain")]
    print("tokens that trigger them, with their share of the prompt's significance:")
    for row, significance in zip(chosen, explained, strict=True):
        print(f"   {noise_mean(row[first]):9.4g}  {as_text(significance)}")
    if explained:
        print(f"picture: {draw_significance(explained[:20], store.folder / 'tokens.png')}")


def write_costs(args: argparse.Namespace, pipe, detectors: list, frame, store, batch_size: int) -> None:
    """UNet evaluations and seconds a prompt of each detector alone, to ``costs.json`` beside the scores."""
    from memorization.io.files import write_atomically
    from memorization.runs.costs import measure_costs

    prompts = frame["prompt"].tolist()[:4]
    batch_size = store.record.get("batch_size_used", batch_size)
    costs = measure_costs(pipe, detectors, prompts, steps=args.steps, batch_size=batch_size)
    write_atomically(store.folder / "costs.json", json.dumps(costs, indent=1) + "\n")


def settings_of(args: argparse.Namespace, pipe, detectors: list, hashes: dict, dtype: str, batch_size: int) -> dict:
    """Everything the scores depend on."""
    from memorization.models.loading import revision_of

    kept = {d.name: {**vars(d), **{key: list(getattr(d, key)) for key in ("terms", "curves") if hasattr(d, key)}}
            for d in detectors}  # fmt: skip
    return {
        "model": args.model, "revision": revision_of(pipe), "prompts": hashes, "detectors": kept,
        "num_images": args.num_images, "seed": args.seed, "steps": args.steps, "dtype": dtype,
        "batch_size": batch_size,
    }  # fmt: skip


def main() -> None:
    args = parse_arguments()
    # Imports that take seconds come after the arguments are known to be good.
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.logging.set_verbosity_error()
        library.logging.disable_progress_bar()

    from memorization.detectors.registry import make_detectors
    from memorization.evaluation.calibration import Calibration, read_calibration
    from memorization.models.devices import pick_device, pick_dtype
    from memorization.models.loading import load_pipeline
    from memorization.models.registry import find_model
    from memorization.runs.detect import Scorer, SequentialScorer, run_detection
    from memorization.runs.memory import default_batch_size
    from memorization.runs.pictures import run_pictures
    from memorization.runs.store import ResultStore

    spec = find_model(args.model)
    calibration = read_calibration(Path(args.calibration)) if args.calibration else Calibration()
    asked = {"model": args.model, "num_images": args.num_images, "steps": args.steps, **asked_of_anisotropy(args)}
    calibration.check(asked)
    thresholds = calibration.thresholds
    anisotropy = {**spec.anisotropy, **asked_of_anisotropy(args), **calibration.anisotropy}
    detectors = make_detectors(args.detectors, assigned(args, {"anisotropy": anisotropy}))
    first = next((detector.name for detector in detectors if detector.terms), None)  # others keep curves alone
    if first is None and (args.explain or args.sequential):
        raise InputError(f"{', '.join(args.detectors)}: has no score of its own, so nothing can be flagged by it")
    frame, hashes = read_images(args, detectors) if args.images else read_prompt_lists(args, spec)
    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype or spec.dtype, device)
    pipe = load_pipeline(spec, dtype, device, pictures=bool(args.images))
    if not args.images:
        report(frame, pipe)

    batch_size = default_batch_size(pipe) if args.batch_size == "auto" else int(args.batch_size)
    checkpoint = Path(pipe.config["_name_or_path"])
    if checkpoint.is_relative_to(ROOT):
        checkpoint = checkpoint.relative_to(ROOT)
    info = {"device": str(device), "checkpoint": str(checkpoint), "thresholds": thresholds}
    out = args.out or ROOT / "results" / "local" / spec.name
    settings = settings_of(args, pipe, detectors, hashes, dtype, batch_size)
    common = dict(
        seed=args.seed,
        steps=args.steps,
        guidance_scale=spec.guidance_scale if args.guidance_scale is None else args.guidance_scale,
    )
    if not args.images and any(detector.needs in ("generation", "image") for detector in detectors):
        settings["guidance_scale"] = common["guidance_scale"]
    if args.sequential:
        if first not in calibration.bands:
            raise InputError(f"{args.calibration}: has no bands for {first}; detect_eval.py --calibrate makes them")
        bands = calibration.bands[first]
        settings["sequential"] = {"detector": first, "bands": [[n, *band] for n, band in bands.items()]}
    with ResultStore(out, settings, info, args.overwrite) as store:
        if args.images:
            run_pictures(pipe, frame, detectors, store, batch_size=batch_size)
        elif args.sequential:
            scorer = partial(SequentialScorer, pipe, detectors, detector=first, bands=bands, **common)
            run_detection(scorer, frame, store, batch_size=batch_size)
        else:
            scorer = partial(Scorer, pipe, detectors, noises=args.num_images, **common)
            run_detection(scorer, frame, store, batch_size=batch_size)
    print_summary(store, first, thresholds)
    if args.explain:
        explain(args, pipe, store, first, thresholds)
    if args.measure_costs:
        write_costs(args, pipe, detectors, frame, store, batch_size)


if __name__ == "__main__":
    run_script(main)
