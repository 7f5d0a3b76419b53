"""Score prompts for memorization: prompt list -> results/<run>/scores.jsonl, a line a prompt.

  python detect_mem.py --model testbed-eps                          the shipped model and its prompt list
  python detect_mem.py --model sd14                                 Stable Diffusion 1.4 and the paper's lists
  python detect_mem.py --model ./my-model --prompts my_prompts.txt  your own checkpoint and prompts

A killed run goes on where it stopped when the same command is given again. By torchrun or accelerate launch, several
processes share it (docs/many-gpus.md).
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from memorization.detectors.base import DEFAULT_DETECTORS, DEFAULT_FOR_PICTURES, DETECTORS
from memorization.errors import InputError, printable
from memorization.flags import ArgumentParser, Arguments, add_flags, add_settings, assigned, names, value
from memorization.launch import main_alone, shared
from memorization.localisation.base import MAPS, make_maps
from memorization.settings import Count


def parse(arguments: Arguments = None) -> argparse.Namespace:
    """The flags, checked."""
    parser = ArgumentParser(description=__doc__)
    add = parser.add_argument
    # fmt: off
    add_flags(parser, "--model", required=True)
    add_flags(parser, "--config", "--lora", "--prompts")
    add("--memorized", type=Path, metavar="FILE", help="a list whose prompts all count as memorized; "
        "needs --non-memorized")
    add("--non-memorized", type=Path, metavar="FILE", help="a list whose prompts all count as not memorized")
    add("--sample", type=value(Count), metavar="N", help="N prompts of the list, always the same ones: the memorized "
        "ones, up to a half, then others (of both splits, where the list has them)")
    add("--images", "--pictures", dest="pictures", type=Path, metavar="DIR",
        help="score pictures, by the detectors that need a picture; a metadata.jsonl may give prompts and labels")
    add("--detectors", type=names, metavar="A,B|all", help=f"default: {','.join(DEFAULT_DETECTORS)}, and "
        f"{','.join(DEFAULT_FOR_PICTURES)} for --images")
    add_flags(parser, "--noises", default=1)
    add_flags(parser, "--seed", "--steps", "--guidance-scale")
    add_settings(parser, "a detector's setting by its name in docs/detectors.md, as in p_laplace.timestep=50",
        of=DEFAULT_DETECTORS[0],
        variant="official: the public code's numbers; eps: one meaning for every prediction type (default: official)",
        cosine_mode="x,c|x: cos(eps_u, d); x,x|c: cos(eps_u, eps_c); x|c,c|x: cos(eps_c, d) (default: x,c|x)",
        cosine="pixel: over the channels of each latent pixel, then averaged; vector: over the whole latent "
               "(default: pixel)",
        normalization="None, L1 or L2: divide each noise prediction by its norm first (default: None)")
    add("--sequential", action="store_true",
        help="1, 2, 4, 8 noises, more for undecided prompts alone; needs a --calibration made with --noises 8")
    add("--explain", action="store_true",
        help="print, and draw to tokens.png, which tokens trigger the flagged prompts (else the ten highest)")
    add("--localise", type=names, nargs="?", const=["all"], metavar="A,B|all",
        help="generate the flagged prompts (else the ten highest) and draw, into maps/, where their pictures are "
             f"copied (maps: {', '.join(MAPS)})")
    add("--measure-costs", action="store_true", help="write each detector's cost alone, by four prompts, to costs.json")
    add_flags(parser, "--calibration", "--dtype", "--device", "--offload", "--batch-size", "--out", "--overwrite")
    # fmt: on
    args = parser.parse_args(arguments)
    args.detectors = args.detectors or list(DEFAULT_FOR_PICTURES if args.pictures else DEFAULT_DETECTORS)
    if args.calibration == "none":
        args.calibration = None
    if args.sequential and not args.calibration:
        parser.error("--sequential needs --calibration FILE, made with --noises 8")
    of_lists = (args.prompts, args.memorized, args.sample)
    of_prompts = (args.explain, args.localise, args.sequential, args.measure_costs)
    if args.pictures and any(of_lists + of_prompts):
        parser.error("--images goes without lists of prompts, --explain, --localise, --sequential and --measure-costs")
    if args.pictures and (args.noises != 1 or args.guidance_scale is not None):
        parser.error("--images goes without --noises and --guidance-scale: pictures are scored as they are")
    if bool(args.memorized) != bool(args.non_memorized) or (args.memorized and args.prompts):
        parser.error("give either --prompts, or --memorized and --non-memorized")
    maps = list(MAPS) if args.localise == ["all"] else args.localise or []
    args.settings = settings_by_method(args, maps)
    of_maps = {name: args.settings.pop(name) for name in maps if name in args.settings and name not in DETECTORS}
    args.maps = make_maps(maps, of_maps)
    return args


def settings_by_method(args: argparse.Namespace, maps: Sequence[str]) -> dict[str, dict[str, str]]:
    """What ``--set`` and its shortcuts say of detectors and ``maps``."""
    found: dict[str, dict[str, str]] = {}
    for text in args.assignments:
        name, value = assigned(text)
        detector, _, setting = name.partition(".")
        if not setting or not {detector, "all"} & {*args.detectors, *maps}:
            raise InputError(f"--set {text}: write DETECTOR.SETTING=VALUE, of a detector that --detectors names")
        found.setdefault(detector, {})[setting] = value
    return found


@shared
def main(arguments: Arguments = None) -> None:
    """Parse, score, print."""
    args = parse(arguments)
    # Imports that take seconds come after the arguments are known to be good.
    from memorization.evaluation.calibration import Calibration, read_calibration
    from memorization.io.prompts import read_lists, sample
    from memorization.models.base import check_able
    from memorization.models.loading import load_model
    from memorization.models.spec import find_model
    from memorization.paths import default_out
    from memorization.runs.costs import write_costs
    from memorization.runs.detect import Scoring, able_detectors, configured_detectors, deciding, detect, notes_on
    from memorization.runs.explain import check_explainable
    from memorization.runs.pictures import check_needs, read_pictures
    from memorization.runs.scorer import check_precision

    spec = find_model(args.model)
    calibration = read_calibration(Path(args.calibration)) if args.calibration else Calibration()
    scoring = Scoring(args.noises, args.seed, args.steps, args.guidance_scale,
                      None if args.batch_size == "auto" else args.batch_size, args.sequential)  # fmt: skip
    holds_for = {"model": args.model, "num_images": scoring.noises, "steps": scoring.steps}
    detectors = configured_detectors(args.detectors, args.settings, spec, calibration, holds_for)
    first = deciding(detectors)
    if first is None and (args.explain or args.localise or args.sequential):
        raise InputError(f"{', '.join(args.detectors)}: has no score of its own, so nothing can be flagged by it")
    if args.pictures:
        check_needs(detectors)
        listed = read_pictures(args.pictures)
    else:
        listed = read_lists(chosen_lists(args) or spec.lists())
        listed = sample(listed, args.sample) if args.sample else listed
    model = load_model(args.model, device=args.device, dtype=args.dtype, pictures=bool(args.pictures or args.maps),
                       any_family=True, config=args.config, adapters=args.lora, offload=args.offload)  # fmt: skip
    check_able(model.pipe, args.maps)  # said before a list is scored, which may take days
    check_precision(model.pipe, args.maps)
    if args.explain:
        check_explainable(model.pipe)
    detectors, left_out = able_detectors(model.pipe, detectors, args.detectors)
    if left_out:
        print(f"left out: {'; '.join(left_out)}", file=sys.stderr)
    if not args.pictures:
        print(notes_on(model.pipe, listed.frame), file=sys.stderr)
    out = args.out or default_out("detection", spec.name, "main")
    store = detect(model, listed, detectors, scoring, calibration=calibration, out=out, overwrite=args.overwrite)
    main_alone()
    threshold = calibration.thresholds.get(first or "")
    print_summary(store.rows, first, threshold, out / "scores.jsonl")
    if args.explain and first:
        print_tokens(model, store, first, scoring, threshold, out / "tokens.png")
    if args.maps and first:
        from memorization.runs.localise import localise

        count = localise(model, store.rows, first, args.maps, scoring, threshold, out / "maps")
        print(f"maps:   {count} prompts in {printable(os.path.relpath(out / 'maps'))}")
    if args.measure_costs:
        write_costs(model, detectors, listed, scoring, store, out / "costs.json")


def chosen_lists(args: argparse.Namespace) -> dict[str, Path]:
    """Role -> file of the lists that were given."""
    roles = ("prompts", "memorized", "non_memorized")
    return {role: path for role in roles if (path := getattr(args, role))}


def print_summary(rows: list[dict], first: str | None, threshold: float | None, scores: Path) -> None:
    """Where the scores are, and the prompts or pictures that score highest by ``first``."""
    from memorization.evaluation.metrics import noise_mean

    if first is not None:
        score = {row["id"]: noise_mean(row[first]) for row in rows}
        flagged = {i for i, value in score.items() if threshold is not None and value >= threshold}
        if threshold is None:
            print(f"Highest {first} of {len(rows)} prompts:")
        else:
            print(f"{len(flagged)} of {len(rows)} prompts are flagged ({first} >= {threshold:.4g}). The highest:")
        for row in sorted(rows, key=lambda row: -score[row["id"]])[:10]:
            mark = "*" if row["id"] in flagged else " "
            print(f" {mark} {score[row['id']]:9.4g}  {printable(row.get('image', row['prompt'])[:100])}")
    print(f"scores: {printable(str(scores))}")
    if first is not None and "label" in rows[0]:
        print(f"next:   python detect_eval.py {printable(os.path.relpath(scores.parent))}")


def print_tokens(model, store, first: str, scoring, threshold: float | None, path: Path) -> None:
    """Print and draw which tokens trigger the prompts."""
    from memorization.detectors.explain import as_text, draw_significance
    from memorization.runs.explain import explain

    explained = explain(model, store.rows, first, scoring, threshold)
    print("tokens that trigger them, with their share of the prompt's significance:")
    for score, significance in explained:
        print(f"   {score:9.4g}  {printable(as_text(significance))}")
    if explained:
        print(f"picture: {draw_significance([significance for _, significance in explained[:20]], path)}")
