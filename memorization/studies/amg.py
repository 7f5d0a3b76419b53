"""AMG taken apart, on a text-conditional model: ``python -m memorization.studies.amg --model testbed-eps``

On memorized and ordinary prompts of a labelled list: each guidance alone, in pairs and all three; all three with a
constant gate and without one. Then a picture of one prompt's way: nearness to the training set against the step, with
and without AMG. The comparison with other mitigations is ``memorization.studies.mitigation_tradeoff``.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import pandas as pd
import torch

from memorization.errors import ArgumentParser, run_script
from memorization.mitigations import AMG, Case
from memorization.mitigations.amg_guide import AntiMemorization
from memorization.plots import save_figure
from memorization.results import ResultStore, read_lines, write_atomically
from memorization.studies.mitigation_tradeoff import add_study_arguments, make_study, run, table_of
from memorization.tables import markdown
from memorization.trajectory import generate

GUIDANCES = ("spe", "dup", "sim", "sim+spe", "sim+dup", "spe+dup", "spe+dup+sim")
ALWAYS = {"nl2": 3.0, "sscd": 1e-6, "clip": 1e-6}  # a gate that every picture is nearer than


def gates(measure: str) -> dict[str, dict]:
    """Settings of AMG for other gates than the preset's."""
    return {
        "constant gate": {"gate_decay": 1e-12},  # at its end at every step
        "no gate": {"gate_start": ALWAYS[measure], "gate_end": ALWAYS[measure]},
    }


class Variant(NamedTuple):
    """Some of the guidances behind some gate."""

    guidances: str
    gate: str = "scheduled"
    strength: float = 1.0

    def mitigation(self, settings: dict[str, dict]) -> AMG:
        """AMG with the model's settings, but for these."""
        base = AMG(**{**settings["amg"], "strength": self.strength, "guidances": self.guidances})
        changed = gates(base.nearest().measure).get(self.gate, {})
        return AMG(**{**vars(base), **changed})


VARIANTS = [
    *(Variant(guidances) for guidances in GUIDANCES),
    Variant("spe+dup+sim", "constant gate"),
    Variant("spe+dup+sim", "no gate"),
    Variant("spe+dup+sim", strength=1.15),
]


@torch.no_grad()
def looks_of(case: Case, amg: AMG) -> AntiMemorization:
    """The guide after it has led the generation of the first prompt of a case, on all noises."""
    guide, images = amg.guide(case), len(case.noise)
    embeds = case.embeds[:1].expand(images, -1, -1)
    options = {"steps": case.steps, "guidance_scale": case.guidance_scale, "guide": guide}
    for _ in generate(case.pipe, embeds, case.pipe.embed([""]), case.noise, **options):
        pass
    return guide


def draw(case: Case, amg: AMG, path: Path) -> None:
    """Nearness against the timestep, a line a noise: plain, and with AMG; where its gate was open it has a marker."""
    figure, axis = plt.subplots(figsize=(7.5, 4.5))
    sides = {"plain": ("none", "0.6"), "with AMG": (amg.guidances, "C3")}
    for name, (guidances, color) in sides.items():
        guide = looks_of(case, AMG(**{**vars(amg), "guidances": guidances, "every": 1}))
        t = [look.timestep for look in guide.looks]
        sigma, opened = (torch.stack([getattr(look, key) for look in guide.looks]) for key in ("sigma", "open"))
        values = sigma.abs().numpy()
        axis.plot(t, values, color=color, lw=1, label=[name, *[None] * (values.shape[1] - 1)])
        if guidances != "none":
            for row in range(values.shape[1]):
                axis.scatter(*zip(*[(a, b) for a, b, o in zip(t, values[:, row], opened[:, row], strict=True) if o],
                                  strict=True) if opened[:, row].any() else ([], []), s=14, color=color)  # fmt: skip
            axis.plot(t, [look.gate for look in guide.looks], "k--", lw=1, label="gate (dots: open)")
            for key, label, style in (("s1", "s1, despecification", ":"), ("s2", "s2, deduplication", "-.")):
                scales = [getattr(look, key).mean().item() for look in guide.looks]
                axis.plot(t, scales, style, color="C0", lw=1, label=f"{label} (mean)")
    axis.invert_xaxis()
    axis.set(
        xlabel="timestep (noise on the left)", ylabel=guide.nearest.measure, title=case.prompts[0].replace("$", r"\$")
    )
    axis.legend(fontsize=7)
    axis.grid(alpha=0.3)
    save_figure(figure, path)


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    add_study_arguments(parser)
    args = parser.parse_args()
    study, settings, out, copy = make_study(args, "amg")
    with ResultStore(out, settings, {}) as store:
        run(study, VARIANTS, store)
    rows = pd.DataFrame(read_lines(out / "scores.jsonl")[0])
    table = table_of(rows, Variant._fields, copy, args.resamples)
    print(markdown(table.round(3).astype(object).fillna("")))
    write_atomically(out / "table.csv", table.round(4).to_csv(index=False))
    draw(study.cases[0], AMG(**study.mitigation_settings["amg"]), out / "trajectory.png")
    print(f"{out}/table.csv, trajectory.png")


if __name__ == "__main__":
    run_script(main)
