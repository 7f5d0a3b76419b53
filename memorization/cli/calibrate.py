"""Thresholds for the guard of a pipeline, from ordinary prompts alone: the file that memorization.protect reads.

  python -m memorization calibrate --model ./my-model --prompts ordinary.txt --out thresholds.yaml
  python -m memorization calibrate --model sd14 --prompts ordinary.txt --scheduler EulerDiscreteScheduler --fpr 0.05

Each prompt is drawn from one noise as far as its first step. The file holds for these weights, this dtype, scheduler,
guidance, number of steps and size alone, and is refused for anything else. Of a list with labels the prompts with
label 0 are taken, of one with splits those for validation.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from memorization.errors import printable
from memorization.flags import ArgumentParser, Arguments, add_flags, value
from memorization.settings import Count


def parse(arguments: Arguments = None) -> argparse.Namespace:
    """The flags, checked."""
    parser = ArgumentParser(description=__doc__)
    add = parser.add_argument
    # fmt: off
    add_flags(parser, "--model", required=True)
    add_flags(parser, "--config", "--lora")
    add_flags(parser, "--prompts", required=True, help="ordinary prompts: .txt, .csv or .jsonl")
    add_flags(parser, "--fpr", help="share of ordinary pictures that may be flagged (default: %(default)s)")
    add("--scheduler", metavar="CLASS", help="of diffusers, as your pipeline has it (default: the checkpoint's own)")
    add_flags(parser, "--steps", help="of your generations (default: %(default)s)")
    add_flags(parser, "--guidance-scale", "--seed")
    add("--read", type=value(Count), default=1, metavar="N", help="steps whose scores are averaged, as the argument "
        "steps of protect (default: %(default)s)")
    add_flags(parser, "--batch-size", type=value(Count), default=8, metavar="N", help="prompts to a call of the "
        "pipeline (default: %(default)s)")
    add_flags(parser, "--dtype", "--device", "--offload")
    add_flags(parser, "--out", default=Path("thresholds.yaml"), metavar="FILE", help="default: %(default)s")
    # fmt: on
    return parser.parse_args(arguments)


def main(arguments: Arguments = None) -> None:
    """Parse, calibrate, print."""
    args = parse(arguments)
    # Imports that take seconds come after the arguments are known to be good.
    from memorization.io.prompts import ordinary

    prompts, families = ordinary(args.prompts)
    import torch

    from memorization.guard.calibrating import calibrate
    from memorization.models.loading import load_model, pipeline_of, with_scheduler

    model = load_model(args.model, device=args.device, dtype=args.dtype, any_family=True, config=args.config,
                       adapters=args.lora, offload=args.offload)  # fmt: skip
    pipe = pipeline_of(model)
    if args.scheduler:
        with_scheduler(pipe, args.scheduler)
    scale = model.spec.scale if args.guidance_scale is None else args.guidance_scale
    found = calibrate(
        pipe, prompts, families=families, fpr=args.fpr, steps=args.read,
        generator=torch.Generator().manual_seed(args.seed), batch_size=args.batch_size,
        num_inference_steps=args.steps, guidance_scale=scale,
    )  # fmt: skip
    found.save(args.out)
    threshold = found.at(args.fpr)
    print(f"threshold {threshold.value:.4g}: {threshold.source}; {found.left_out} near-copies left out")
    print(printable(str(args.out)))
