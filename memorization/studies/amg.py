"""The tables of AMG on a text-conditional model: ``python -m memorization.studies.amg --model testbed-eps``

Chen, Liu, Xu, "Towards Memorization-Free Diffusion Models", CVPR 2024, in kind: on memorized and ordinary prompts of a
labelled list, all from the same noise,

1. plain sampling beside random perturbations of the prompt (GNI, RT, CWR, RNA), a model whose memorized prompts were
   ablated (``--ablated``) and AMG at two strengths;
2. AMG's guidances alone, in pairs and all three; with a constant gate, without one (where nL2's dissimilarity, which
   grows with the excess over the gate, then counts it from 3), and looking at every step;
3. pictures: training | plain | AMG, and the nearness to the training set along one prompt's generations.

AMG lowers the nearness of its own index: read the other measures. A killed study goes on where it stopped.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch

from memorization.errors import InputError
from memorization.flags import ArgumentParser, Arguments, names, run_script
from memorization.io.figures import save_figure
from memorization.mitigations.amg import AMG
from memorization.mitigations.amg.guide import AntiMemorization
from memorization.mitigations.case import Case
from memorization.models.generation import generate
from memorization.models.loading import load_pipeline, revision_of
from memorization.models.spec import find_model
from memorization.similarity.judge import Measure
from memorization.studies.compare import PLAIN, Comparison, Row
from memorization.studies.compare_prompts import Bench, add_comparison_arguments
from memorization.studies.compare_report import draw_sheet, print_table, write_report

PERTURBATIONS = ("gni", "rt", "cwr", "rna")
GUIDANCES = ("spe", "dup", "sim", "sim+spe", "sim+dup", "spe+dup")
ALWAYS = {"nl2": 3.0, "sscd": -1.0, "clip": -1.0}  # a gate that every picture is nearer than
MAIN, STRONG, ABLATION = "amg main", "amg strong", "ablation"
SHOWN = (ABLATION, "rt", MAIN, STRONG, "sim")  # in the contact sheet


def gates(measure: str) -> dict[str, dict]:
    """Settings of AMG by the name of a row: for other gates than the preset's, and for looking as often as it can."""
    return {
        "constant gate": {"gate_decay": 1e-12},  # at its end at every step
        "no gate": {"gate_start": ALWAYS[measure], "gate_end": ALWAYS[measure]},
        "looks every step": {"every": 1},
    }


def variants(measure: str) -> dict[str, dict]:
    """Settings of AMG by the name of a row: the preset's, stronger, its guidances apart, and other gates."""
    apart = {name: {"guidances": name} for name in GUIDANCES}
    return {MAIN: {}, STRONG: {"strength": 1.15}, **apart, **gates(measure)}


def preset_of(bench: Bench) -> AMG:
    """AMG as the model's config has it."""
    mitigation = bench.row(AMG.name, {}, MAIN).mitigation
    assert isinstance(mitigation, AMG)
    return mitigation


def rows_of(bench: Bench) -> dict[str, Row]:
    """The rows of both tables by name, besides plain sampling and the ablated model's."""
    rows = [bench.row(name, {}, name) for name in PERTURBATIONS]
    for name, settings in variants(preset_of(bench).nearest().measure).items():
        rows.append(bench.row(AMG.name, settings, name, AMG.name if name in (MAIN, STRONG) else name))
    return {row.name: row for row in rows}


def chosen_rows(rows: dict[str, Row], wanted: str) -> list[Row]:
    """The rows that were asked for.

    Raises:
        InputError: there is no such row.
    """
    chosen = list(rows) if wanted == "all" else names(wanted)
    if unknown := [name for name in chosen if name not in rows]:
        raise InputError(f"no row {unknown[0]!r}; there are: {', '.join(rows)}")
    return [rows[name] for name in chosen]


def fill_ablated(comparison: Comparison, bench: Bench, folder: str) -> None:
    """Plain sampling of another model: the row ``ablation``."""
    device, dtype = bench.subject.pipe.device, bench.subject.settings["dtype"]
    pipe = load_pipeline(find_model(folder), dtype, device, pictures=True)
    comparison.fill(Row(ABLATION, ABLATION, revision=revision_of(pipe, pictures=True)), bench.batches(None, pipe))


@torch.no_grad()
def looks_of(case: Case, amg: AMG) -> AntiMemorization:
    """The guide after it has led the generation of the first prompt of a case, on all noises."""
    guide, images = amg.guide(case), len(case.noise)
    embeds = case.embeds[:1].expand(images, -1, -1)
    empty = case.pipe.embed([""])
    for _ in generate(
        case.pipe, embeds, empty, case.noise, steps=case.steps, guidance_scale=case.guidance_scale, guide=guide
    ):
        pass
    return guide


def draw_trajectory(case: Case, amg: AMG, path: Path) -> None:
    """Nearness against the timestep, a line a noise, plain and with AMG, and below it what acted at each step."""
    figure, (upper, lower) = plt.subplots(2, 1, figsize=(7.5, 6), sharex=True, height_ratios=[3, 2])
    for name, guidances, color in (("plain", "none", "0.6"), ("with AMG", amg.guidances, "C3")):
        guide = looks_of(case, replace(amg, guidances=guidances, every=1))
        t = np.array([look.timestep for look in guide.looks])
        sigma, opened = (torch.stack([getattr(look, key) for look in guide.looks]).numpy() for key in ("sigma", "open"))
        upper.plot(t, np.abs(sigma), color=color, lw=1, label=[name, *[None] * (sigma.shape[1] - 1)])
    upper.scatter(*(np.broadcast_to(v, sigma.shape)[opened] for v in (t[:, None], np.abs(sigma))), s=14, color=color)
    upper.plot(t, [look.gate for look in guide.looks], "k--", lw=1, label="gate (dots: open)")
    upper.set(ylabel=guide.nearest.measure, title=case.prompts[0])
    for key, label in (("s1", "s1: despecification"), ("s2", "s2: caption deduplication"), ("sim", "|G_sim| / |eps|")):
        lower.plot(t, [getattr(look, key).mean() for look in guide.looks], ".-", lw=1, label=f"{label}, mean")
    lower.axhline(guide.scale - 1, color="0.8", lw=1, label="s0 - 1: their limit")
    lower.set(xlabel="timestep (noise on the left)", ylabel="guidance")
    lower.invert_xaxis()
    for axis in (upper, lower):
        axis.legend(fontsize=7)
        axis.grid(alpha=0.3)
    save_figure(figure, path)


def main(arguments: Arguments = None, measures: Mapping[str, Measure] | None = None) -> None:
    """Compare; ``measures``: of the judge, beside its own."""
    parser = ArgumentParser(description=__doc__)
    add_comparison_arguments(parser, memorized=24)
    add = parser.add_argument
    add("--ablated", metavar="FOLDER", help="a model whose memorized prompts were ablated, for a row of its own")
    add("--rows", default="all", metavar="A,B|all", help="besides plain sampling; others may be added later")
    args = parser.parse_args(arguments)
    bench = Bench(args, "amg", measures)
    with bench.compared(chosen_rows(rows_of(bench), args.rows)) as comparison:
        if args.ablated:
            fill_ablated(comparison, bench, args.ablated)
        draw_sheet(comparison, SHOWN, bench.items, bench.judge, bench.out / "sheet.png")
    table = write_report(bench.out, args.resamples, bench.title).set_index("row", drop=False)
    for chosen in ((PLAIN, ABLATION, *PERTURBATIONS, MAIN, STRONG), (PLAIN, *GUIDANCES, MAIN, *gates("nl2"))):
        print_table(table.loc[[name for name in chosen if name in table.index]])
    draw_trajectory(bench.first_case(), preset_of(bench), bench.out / "trajectory.png")
    print(f"{bench.out}/table.csv, tradeoff.png, sheet.png, trajectory.png")


if __name__ == "__main__":
    run_script(main)
