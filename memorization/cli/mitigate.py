"""Make memorized prompts safe: prompts -> other text, embeddings, noise or guidance, with pictures and measurements.

  python mitigate_mem.py --model testbed-eps                             flagged prompts of the shipped model
  python mitigate_mem.py --model testbed-eps --method rewrite            change the words instead of the embedding
  python mitigate_mem.py --model ./my-model --prompts mine.txt --calibration mine.yaml
  python mitigate_mem.py --method sail --help                            the settings and strengths of a method

Prompts above the calibrated threshold are mitigated (all of them with --all). The output folder gets a line a prompt in
mitigations.jsonl, the pictures before and after from the same noise, the new embeddings, and a contact sheet. A killed
run goes on where it stopped when the same command is given again. By torchrun or accelerate launch, several processes
share it (docs/many-gpus.md).
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from memorization.errors import printable
from memorization.flags import ArgumentParser, Arguments, add_flags, add_settings, assigned, value
from memorization.launch import main_alone, shared
from memorization.mitigations.base import DEFAULT_MITIGATION, MITIGATIONS
from memorization.settings import Count, annotations_of, described


def parse(arguments: Arguments = None) -> argparse.Namespace:
    """The flags, checked."""
    parser = ArgumentParser(description=__doc__, epilog=about_methods(sys.argv[1:] if arguments is None else arguments))
    add = parser.add_argument
    # fmt: off
    add_flags(parser, "--model", required=True)
    add_flags(parser, "--config", "--lora")
    add_flags(parser, "--prompts")
    add("--method", default=DEFAULT_MITIGATION, metavar="NAME", help="see below (default: %(default)s)")
    add("--strength", type=value(float), metavar="S", help="of the method (default: the method's own)")
    add_settings(parser, "another setting of the method, as in target=3 (the score to stop at) or lr=0.1")
    add_flags(parser, "--index", "--calibration")
    add("--threshold", type=value(float | Literal["auto"]), default="auto", metavar="X|auto",
        help="score from which on a prompt is mitigated (default: the calibrated one)")
    add("--all", action="store_true", help="mitigate every prompt, whatever its score")
    add("--limit", type=value(Count), metavar="N", help="the first N of these prompts")
    add_flags(parser, "--noises", help="noises a prompt (default: as calibrated, else 4)")
    add_flags(parser, "--seed", "--steps", "--guidance-scale", "--clip", "--sscd", "--dtype", "--device",
        "--offload", "--batch-size")
    add_flags(parser, "--out", help="default: results/local/mitigated/<model>/<method>")
    add_flags(parser, "--overwrite")
    # fmt: on
    args = parser.parse_args(arguments)
    args.settings = {} if args.strength is None else {"strength": args.strength}
    args.settings |= dict(map(assigned, args.assignments))
    return args


def about_methods(arguments: Sequence[str]) -> str:
    """The methods, and the settings of the one that ``--help`` was asked for with; only its file is read then."""
    said = f"methods (docs/mitigations.md says what each does): {', '.join(MITIGATIONS)}"
    asked = list(arguments[arguments.index("--method") + 1 :][:1]) if "--method" in arguments else []
    if not {"-h", "--help"} & set(arguments) or not set(asked) & set(MITIGATIONS):
        return said
    cls = MITIGATIONS[asked[0]]
    settings = [f"  {name:12} {described(kind)}; default: {getattr(cls, name)}"
                for name, kind in annotations_of(cls).items()]  # fmt: skip
    strengths = f"strengths from mild to strong: {', '.join(f'{strength:g}' for strength in cls.strengths)}"
    return "\n".join([said, "", f"{asked[0]}: {strengths}. Settings:", *settings])


@shared
def main(arguments: Arguments = None) -> None:
    """Parse, mitigate, print."""
    args = parse(arguments)
    # Imports that take seconds come after the arguments are known to be good.
    from memorization.evaluation.calibration import Calibration, read_calibration
    from memorization.models.loading import load_model
    from memorization.models.spec import find_model
    from memorization.paths import default_out
    from memorization.runs.kept import contact_sheet
    from memorization.runs.mitigate import Mitigating, configured_mitigation, mitigate_list, prompts_of

    spec = find_model(args.model)
    mitigation = configured_mitigation(args.method, args.settings, spec, args.index)
    path = args.calibration or spec.calibration
    calibration = read_calibration(Path(path)) if path and path != "none" else Calibration()
    plan = Mitigating(
        args.noises, args.seed, args.steps, args.guidance_scale, None if args.batch_size == "auto" else args.batch_size,
        None if args.all else args.threshold, args.limit,
    )  # fmt: skip
    plan.calibrated(args.model, mitigation, calibration)  # what is missing is said before the model is loaded
    prompts = prompts_of(spec, args.prompts)
    model = load_model(args.model, device=args.device, dtype=args.dtype, any_family=True, config=args.config,
                       adapters=args.lora, offload=args.offload)  # fmt: skip
    out = args.out or default_out("mitigated", spec.name, args.method)
    result = mitigate_list(model, prompts, mitigation, plan, calibration=calibration, clip=args.clip, sscd=args.sscd,
                           out=out, overwrite=args.overwrite)  # fmt: skip
    main_alone()
    if result.kept is None:
        print("no prompt scores at or above the threshold: nothing to mitigate")
        return
    training = result.frame["picture"].tolist()
    sheet = contact_sheet(result.kept, result.rows, training, result.noises, out / "contact_sheet.png")
    print_report(result.rows, out, spec.copy_limits, sheet)


def print_report(rows: list[dict], out: Path, copy_limits: Mapping[str, float], sheet: Path) -> None:
    """The changed prompts, the means before and after, and where everything is."""
    for row in rows:
        if row["new_prompt"] != row["prompt"]:
            change = printable(marked(row["prompt"], row["new_prompt"]))
            print(f"  {row['score_before']:8.4g} -> {row['score_after']:8.4g}  {change}")
    print(summary(rows, copy_limits))
    print(f"{len(rows)} prompts: {printable(os.path.relpath(out))}/mitigations.jsonl, images/, embeds/, {sheet.name}")


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


def summary(rows: list[dict], copy_limits: Mapping[str, float]) -> str:
    """Means before and after, as a table; with the share of pictures that count as copies by each limit."""
    import numpy as np
    import pandas as pd

    from memorization.detectors.base import SCORED_BY
    from memorization.io.tables import markdown
    from memorization.similarity.judge import copies_title, is_copy

    found = []
    names = {"score": SCORED_BY, "nl2": "nL2 to the training picture", "sscd": "SSCD to it", "clip": "CLIP score"}
    for key, name in names.items():
        pairs = [(row[f"{key}_before"], row[f"{key}_after"]) for row in rows if f"{key}_after" in row]
        if pairs:
            before, after = (np.concatenate([np.atleast_1d(pair[i]) for pair in pairs]) for i in (0, 1))
            found.append({"measure": name, "before": f"{before.mean():.3f}", "after": f"{after.mean():.3f}"})
            if key in copy_limits:
                shares = [f"{is_copy(key, values, copy_limits[key]).mean():.1%}" for values in (before, after)]
                title = f"pictures with {copies_title(key, copy_limits[key])}"
                found.append({"measure": title, "before": shares[0], "after": shares[1]})
    return markdown(pd.DataFrame(found))
