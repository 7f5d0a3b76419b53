"""Change a finished adapter so that it copies less, without data: a new file beside it.

  python -m memorization adapter mine.safetensors --scale 0.7 --out weaker.safetensors
  python -m memorization adapter mine.safetensors --keep 0.5 --base sd14 --out aligned.safetensors

--scale lowers its strength. --keep drops, in each layer, the singular directions that are least aligned with the base's
own (after arXiv 2605.10439). Audit the new file to see what came of it. The third way is an earlier epoch: the audit
recommends one.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from memorization.errors import InputError, printable
from memorization.flags import ArgumentParser, Arguments, add_flags, value
from memorization.settings import NotNegative, Share


def parse(arguments: Arguments = None) -> argparse.Namespace:
    """The flags, checked."""
    parser = ArgumentParser(description=__doc__)
    add = parser.add_argument
    # fmt: off
    add("adapter", type=Path, metavar="FILE", help="a LoRA in safetensors")
    add("--scale", type=value(NotNegative), metavar="X", help="times what it adds to each weight")
    add("--keep", type=value(Share), metavar="X", help="share of each layer's singular directions that stays; needs "
        "--base")
    add("--base", metavar="NAME|YAML|FOLDER|HUB_ID", help="the model that it was made for")
    add("--out", type=Path, required=True, metavar="FILE", help="the new adapter")
    add_flags(parser, "--device")
    # fmt: on
    args = parser.parse_args(arguments)
    if args.scale is None and args.keep is None:
        parser.error("give --scale or --keep")
    if (args.keep is None) != (args.base is None):
        parser.error("--keep and --base go together")
    if args.out.suffix != ".safetensors":
        parser.error("--out: only safetensors are written")
    if args.out.exists():
        raise InputError(f"{args.out} exists already; give --out a new name")
    return args


def main(arguments: Arguments = None) -> None:
    """Parse, change, write."""
    args = parse(arguments)
    from memorization.models.loading import load_model
    from memorization.models.lora import aligned, read_layers, save_layers, scaled

    layers = read_layers(args.adapter)
    if args.keep is not None:
        model = load_model(args.base, device=args.device, dtype="float32", pictures=False)
        layers = aligned(layers, model.pipe, args.keep)
    if args.scale is not None:
        layers = scaled(layers, args.scale)
    save_layers(layers, args.out)
    print(printable(f"{args.out}: {len(layers)} layers"))
