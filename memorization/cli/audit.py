"""Audit a fine-tune: which training pictures does it copy, under which prompts, from which epoch on?

  python -m memorization audit --base sd14 --adapter epoch-*.safetensors --training pictures/
  python -m memorization audit --base ./base --adapter output/ --training pictures/ --watch    while it trains

Adapters are LoRA files, fine-tuned checkpoints or folders of them: one is a fine-tune, several are its epochs. The
training folder is as trainers take it: pictures with a .txt beside each, a metadata.jsonl, or a list with columns
file_name and text. Every limit is taken from the base model's own pictures and printed. A killed audit goes on where it
stopped when the same command is given again; epochs may be added. python -m memorization report OUT makes a page.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Annotated

from memorization.errors import printable
from memorization.flags import ArgumentParser, Arguments, add_flags, value
from memorization.settings import Bounds, Count

PARAPHRASES = Annotated[int, Bounds(0, 2)]


def parse(arguments: Arguments = None) -> argparse.Namespace:
    """The flags, checked."""
    parser = ArgumentParser(description=__doc__)
    add = parser.add_argument
    # fmt: off
    add("--base", required=True, metavar="NAME|YAML|FOLDER|HUB_ID", help="the model that was fine-tuned")
    add("--adapter", type=Path, nargs="+", required=True, metavar="FILE|FOLDER",
        help="LoRA files, fine-tuned checkpoints, or folders that a trainer saved them in")
    add("--training", type=Path, required=True, metavar="FOLDER|LIST", help="the training pictures and their captions")
    add("--watch", type=value(Count), nargs="?", const=30, metavar="SECONDS",
        help="look again every so often (30 where no number is given) and audit what is new, until interrupted")
    add_flags(parser, "--prompts", help="prompts of your own to try too: .txt, .csv or .jsonl")
    add("--trigger", metavar="WORD", help="the trigger word, tried alone (default: the words that all captions begin "
        "with)")
    add("--paraphrases", type=value(PARAPHRASES), default=1, metavar="N",
        help="other words for each caption that are tried, 0 to 2 (default: %(default)s)")
    add("--measure", metavar="NAME", help="decides what a copy is (default: the first that can be had of sscd, nl2, "
        "clip)")
    add_flags(parser, "--noises", default=4)
    add_flags(parser, "--steps", default=20, help="of a generation (default: %(default)s)")
    add_flags(parser, "--fpr", help="share of the base's own pictures that may count as copies (default: %(default)s)")
    add_flags(parser, "--seed", "--guidance-scale", "--clip", "--sscd", "--dtype", "--device", "--batch-size")
    add_flags(parser, "--out", help="default: results/local/audit/<base>/<training folder>")
    add_flags(parser, "--overwrite")
    # fmt: on
    return parser.parse_args(arguments)


def main(arguments: Arguments = None) -> None:
    """Parse, audit, print."""
    args = parse(arguments)
    # Imports that take seconds come after the arguments are known to be good.
    from memorization.audit.adapters import find_adapters
    from memorization.audit.engine import Plan
    from memorization.audit.run import Asked, prepare, run_audit, watch
    from memorization.io.prompts import read_prompts
    from memorization.io.training import find_captions
    from memorization.models.loading import load_model
    from memorization.paths import default_out
    from memorization.runs.memory import default_batch_size

    find_captions(args.training)  # what is wrong with the inputs is said before the model is loaded
    adapters = [] if args.watch else find_adapters(args.adapter)
    own = tuple(read_prompts(args.prompts)["prompt"]) if args.prompts else ()
    model = load_model(args.base, device=args.device, dtype=args.dtype)
    scale = model.spec.scale if args.guidance_scale is None else args.guidance_scale
    size = default_batch_size(model.pipe) if args.batch_size == "auto" else args.batch_size
    asked = Asked(args.trigger, own, args.paraphrases, args.fpr, args.measure, args.sscd, args.clip)
    prepared = prepare(model, args.training, Plan(args.noises, args.seed, args.steps, scale, size), asked)
    out = args.out or default_out("audit", model.spec.name, args.training.resolve().name)

    def audit(adapters) -> None:
        found = run_audit(prepared, adapters, out, device=str(model.pipe.device), overwrite=args.overwrite)
        print_findings(found, out)
        args.overwrite = False  # the next look goes on

    if not args.watch:
        print(f"{len(prepared.training)} training pictures; epochs: {', '.join(a.name for a in adapters)}",
              file=sys.stderr)  # fmt: skip
        audit(adapters)
        return
    watch(lambda: find_adapters(args.adapter), audit, lambda: time.sleep(args.watch))


def print_findings(found: dict, out: Path) -> None:
    """The epochs, the pictures that are copied, every limit, and where everything is."""
    import pandas as pd

    from memorization.io.tables import markdown

    rows = []
    for one in found["epochs"]:
        share = one["copies"]["caption"]
        verdicts = [picture["epochs"].get(one["name"], {}).get("verdict") for picture in found["pictures"]]
        rows.append({
            "epoch": one["name"], "copies": f"{share['copies']} of {share['pictures']}",
            "share [95%]": f"{share['share']:.3f} [{share['low']:.3f}, {share['high']:.3f}]",
            "pictures copied": verdicts.count("copied"), "at risk": verdicts.count("at risk"),
            "text alignment": "" if one["alignment"] is None else f"{one['alignment']:.3f}",
        })  # fmt: skip
    print(markdown(pd.DataFrame(rows)))
    for picture in found["pictures"]:
        if picture["copied_from"] is not None:
            print(printable(f"first copied at {picture['copied_from']}: {picture['training']}: {picture['caption']}"))
    for limit in found["limits"]:
        number = "none" if limit["value"] is None else f"{limit['value']:.4g}"
        print(printable(f"limit: {limit['decides']} {number}: {limit['source']}"))
    for known in found["known"]:
        names = ", ".join(known["training"])
        print(printable(f"limit: a copy of {names}, which the base draws itself ({known['drawn']} times): "
                        f"{known['limit']:.4g}"))  # fmt: skip
    print(printable(f"recommended epoch: {found['recommended'] or 'none: every one is seen to copy'}"))
    print(printable(f"next:   python -m memorization report {os.path.relpath(out)}"))
