"""The tables of AMG on a text-conditional model: ``python -m memorization.studies.amg --model testbed-eps``

Chen, Liu, Xu, "Towards Memorization-Free Diffusion Models", CVPR 2024, in kind: on memorized and ordinary prompts of a
labelled list, all from the same noise,

1. plain sampling beside random perturbations of the prompt (GNI, RT, CWR, RNA), a model whose memorized prompts were
   ablated (``--ablated``) and AMG at two strengths;
2. AMG's guidances alone, in pairs and all three; with a constant gate, without one (where nL2's dissimilarity, which
   grows with the excess over the gate, then counts it from 3), and looking at every step;
3. pictures: training | plain | AMG, and the nearness to the training set along one prompt's generations.

Copies are counted by nL2 and by SSCD (CLIP features where its weights are not there), since AMG lowers the nearness of
its own index: read the other. A killed study goes on where it stopped.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from memorization.errors import InputError
from memorization.flags import ArgumentParser, Arguments, run_script
from memorization.index.build import own_index
from memorization.index.store import Index
from memorization.io.figures import save_figure
from memorization.io.files import write_atomically
from memorization.io.pictures import to_tensor
from memorization.io.prompts import picture_files
from memorization.io.tables import markdown
from memorization.mitigations.amg import AMG
from memorization.mitigations.amg.guide import AntiMemorization
from memorization.mitigations.base import Mitigation, make_mitigation
from memorization.mitigations.case import Case, Remedy
from memorization.models.generation import generate
from memorization.models.loading import load_pipeline, revision_of
from memorization.models.spec import find_model
from memorization.paths import ROOT
from memorization.runs.cases import Cases
from memorization.runs.memory import default_batch_size
from memorization.runs.sampling import sample
from memorization.runs.store import ResultStore
from memorization.similarity.clip import Clip
from memorization.similarity.sscd import SSCD, find_weights
from memorization.studies.copying import Copying, Embed, Reference, training_pictures
from memorization.studies.gallery import Gallery
from memorization.studies.labelled import Subject, add_arguments, open_subject
from memorization.studies.mitigation_tradeoff import chosen_prompts

PERTURBATIONS = ("gni", "rt", "cwr", "rna")
GUIDANCES = ("spe", "dup", "sim", "sim+spe", "sim+dup", "spe+dup")
STRONG = 1.15
LIMITS = {"nl2": (1.4, 1.6), "sscd": (0.5, 0.4), "clip": ()}  # the paper's
ALWAYS = {"nl2": 3.0, "sscd": -1.0, "clip": -1.0}  # a gate that every picture is nearer than
MAIN, ABLATION = "amg main", "ablation"
SHOWN = ("base", ABLATION, "rt", MAIN, "amg strong", "sim")  # in the contact sheet


def gates(measure: str) -> dict[str, dict]:
    """Settings of AMG by the name of a row: for other gates than the preset's, and for looking as often as it can."""
    return {
        "constant gate": {"gate_decay": 1e-12},  # at its end at every step
        "no gate": {"gate_start": ALWAYS[measure], "gate_end": ALWAYS[measure]},
        "looks every step": {"every": 1},
    }


def methods(amg: dict) -> dict[str, Mitigation | None]:
    """Rows of the first table."""
    perturbed = {name: make_mitigation(name) for name in PERTURBATIONS}
    return {"base": None, **perturbed, MAIN: AMG(**amg), "amg strong": AMG(**{**amg, "strength": STRONG})}


def parts(amg: dict, measure: str) -> dict[str, AMG]:
    """Further rows of the second table."""
    alone = {name: AMG(**{**amg, "guidances": name}) for name in GUIDANCES}
    return alone | {name: AMG(**{**amg, **changed}) for name, changed in gates(measure).items()}


def cases_of(subject: Subject, pipe, frame: pd.DataFrame, args: argparse.Namespace) -> list[Case]:
    """The prompts in batches, on the same noises."""
    cases = Cases(
        pipe, pipe.pure_noise(args.images, args.seed), args.steps, subject.spec.guidance_scale, args.seed,
        default_batch_size(pipe),
    )  # fmt: skip
    return cases.batches(frame["prompt"].tolist())


def sampled(case: Case, mitigation: Mitigation | None) -> tuple[int, Callable[[], np.ndarray]]:
    """How many pictures a case has, and what makes them, uint8 ``(prompts x images, h, w, 3)``."""

    def make() -> np.ndarray:
        pictures = sample(case, mitigation(case) if mitigation else Remedy.unchanged(case))
        return pictures.reshape(-1, *pictures.shape[2:])

    return len(case.prompts) * len(case.noise), make


class Measures:
    """Measures pictures of ``frame``'s prompts, ``images`` each, and makes tables of them."""

    def __init__(
        self, frame: pd.DataFrame, images: int, copying: Copying, clip: Clip, reference: Reference | None
    ) -> None:
        self.copying, self.clip, self.reference = copying, clip, reference
        self.memorized = np.repeat(frame["label"].to_numpy() == 1, images)
        self.prompts = clip.prompts(frame["prompt"].tolist()).repeat_interleave(images, 0)

    def values(self, gallery: Gallery, row: str) -> dict[str, np.ndarray]:
        """A value a picture under each measure; ``moved``: root mean square difference from plain sampling's."""
        found, first = [], 0
        for pictures, plain in zip(gallery.batches(row), gallery.batches("base"), strict=True):
            text = self.prompts[first : first + len(pictures)]
            first += len(pictures)
            difference = to_tensor(pictures) - to_tensor(plain)
            own = {"text": (self.clip.pictures(pictures) * text).sum(1).numpy(),
                   "moved": difference.square().mean((1, 2, 3)).sqrt().numpy()}  # fmt: skip
            if self.reference:
                own["features"] = self.reference.embed(pictures)
            found.append(own | self.copying(pictures))
        return {name: np.concatenate([own[name] for own in found]) for name in found[0]}

    def row(self, name: str, values: dict[str, np.ndarray], seconds: float) -> dict:
        """What the table says of a row: of memorized prompts, and in the last columns of ordinary ones."""
        memorized = {key: v[self.memorized] for key, v in values.items()}
        ordinary = {key: v[~self.memorized] for key, v in values.items()}
        frechet = {"Frechet": self.reference.distance(memorized["features"])} if self.reference else {}
        return {
            "row": name, **self.copying.columns(memorized), **frechet, "CLIP": float(memorized["text"].mean()),
            "ordinary: CLIP": float(ordinary["text"].mean()), "ordinary: moved": float(ordinary["moved"].mean()),
            "s / picture": seconds,
        }  # fmt: skip

    def frame(self, values: dict[str, dict[str, np.ndarray]]) -> pd.DataFrame:
        """A line a picture, of all rows."""
        shown = ("nl2", self.copying.name, "text", "moved")
        return pd.concat([
            pd.DataFrame({"row": name, "memorized": self.memorized, **{key: own[key].round(4) for key in shown}})
            for name, own in values.items()
        ])  # fmt: skip


def second_measure(clip: Clip) -> tuple[str, Embed]:
    """Its name and what embeds pictures: SSCD, or CLIP where its weights are missing."""
    return ("sscd", SSCD()) if find_weights() else ("clip", lambda pictures: clip.pictures(pictures).numpy())


@torch.no_grad()
def looks_of(case: Case, amg: AMG) -> AntiMemorization:
    """The guide after it has led the generation of the first prompt of a case, on all noises."""
    guide, images = amg.guide(case), len(case.noise)
    embeds = case.embeds[:1].expand(images, -1, -1)
    options = {"steps": case.steps, "guidance_scale": case.guidance_scale, "guide": guide}
    for _ in generate(case.pipe, embeds, case.pipe.embed([""]), case.noise, **options):
        pass
    return guide


def draw_trajectory(case: Case, amg: AMG, path: Path) -> None:
    """Nearness against the timestep, a line a noise, plain and with AMG, and below it what acted at each step."""
    figure, (upper, lower) = plt.subplots(2, 1, figsize=(7.5, 6), sharex=True, height_ratios=[3, 2])
    for name, guidances, color in (("plain", "none", "0.6"), ("with AMG", amg.guidances, "C3")):
        guide = looks_of(case, AMG(**{**vars(amg), "guidances": guidances, "every": 1}))
        t = np.array([look.timestep for look in guide.looks])
        sigma, opened = (torch.stack([getattr(look, key) for look in guide.looks]).numpy() for key in ("sigma", "open"))
        upper.plot(t, np.abs(sigma), color=color, lw=1, label=[name, *[None] * (sigma.shape[1] - 1)])
    upper.scatter(*(np.broadcast_to(v, sigma.shape)[opened] for v in (t[:, None], np.abs(sigma))), s=14, color=color)
    upper.plot(t, [look.gate for look in guide.looks], "k--", lw=1, label="gate (dots: open)")
    upper.set(ylabel=guide.nearest.measure, title=case.prompts[0].replace("$", r"\$"))
    for key, label in (("s1", "s1: despecification"), ("s2", "s2: caption deduplication"), ("sim", "|G_sim| / |eps|")):
        lower.plot(t, [getattr(look, key).mean() for look in guide.looks], ".-", lw=1, label=f"{label}, mean")
    lower.axhline(guide.scale - 1, color="0.8", lw=1, label="s0 - 1: their limit")
    lower.set(xlabel="timestep (noise on the left)", ylabel="guidance")
    lower.invert_xaxis()
    for axis in (upper, lower):
        axis.legend(fontsize=7)
        axis.grid(alpha=0.3)
    save_figure(figure, path)


def fill(
    gallery: Gallery, subject: Subject, frame: pd.DataFrame, args: argparse.Namespace, rows: dict, ablated
) -> None:
    """Make the pictures of all rows, and those of the ablated model if there is one."""
    cases = cases_of(subject, subject.pipe, frame, args)
    for name, mitigation in rows.items():
        gallery.fill(name, [sampled(case, mitigation) for case in cases])
    if ablated:
        gallery.fill(ABLATION, [sampled(case, None) for case in cases_of(subject, ablated, frame, args)])


def make_measures(subject: Subject, frame: pd.DataFrame, args: argparse.Namespace, index: Index) -> Measures:
    """What measures pictures against the training pictures of AMG's index."""
    spec, clip = subject.spec, Clip(subject.spec.clip, subject.pipe.device)
    height, width = (side * subject.pipe.vae_scale_factor for side in subject.pipe.pure_noise(1, 0).shape[2:])
    limits = {name: (*([spec.copy_limits[name]] if name in spec.copy_limits else []), *LIMITS[name]) for name in LIMITS}
    copying = Copying(training_pictures(index, (height, width)), *second_measure(clip), limits)
    listed = args.reference or (spec.reference and ROOT / spec.reference)
    return Measures(frame, args.images, copying, clip, Reference(Index(listed), clip) if listed else None)


def parse(arguments: Arguments = None) -> argparse.Namespace:
    """The flags, checked."""
    parser = ArgumentParser(description=__doc__)
    add_arguments(parser)
    parser.set_defaults(split="test")
    add = parser.add_argument
    add("--memorized", type=int, default=24, metavar="N", help="prompts that are memorized (default: %(default)s)")
    add("--ordinary", type=int, default=8, metavar="N", help="prompts that are not (default: %(default)s)")
    add("--noises", "--num-images", "--images", dest="images", type=int, default=4, metavar="N",
        help="a prompt (default: %(default)s)")  # fmt: skip
    add("--steps", type=int, default=15, help="of a generation (default: %(default)s)")
    add("--index", type=Path, metavar="DIR", help="of the training pictures (default: of those in the model's list)")
    add("--reference", type=Path, metavar="INDEX", help="pixels of pictures as they should look, for the Frechet "
        "distance (default: the model's config)")  # fmt: skip
    add("--ablated", metavar="FOLDER", help="a model whose memorized prompts were ablated, for a row of its own")
    add("--rows", default="all", metavar="A,B|all", help="of the tables, besides base; others may be added later")
    args = parser.parse_args(arguments)
    if min(args.memorized, args.ordinary, args.images) < 1 or not 3 <= args.steps <= 500:
        parser.error("--memorized, --ordinary and --images are at least 1, --steps from 3 to 500")
    if args.memorized * args.images < 2:
        parser.error("a Frechet distance needs two pictures of memorized prompts or more")
    return args


def chosen_rows(rows: dict[str, Mitigation | None], wanted: str) -> dict[str, Mitigation | None]:
    """The rows that were asked for, and base.

    Raises:
        InputError: there is no such row.
    """
    names = ["base", *(list(rows) if wanted == "all" else wanted.split(","))]
    if unknown := [name for name in names if name not in rows]:
        raise InputError(f"no row {unknown[0]!r}; there are: {', '.join(rows)}")
    return {name: rows[name] for name in rows if name in names}


def report(measures: Measures, gallery: Gallery, names: list[str], images: int, out: Path) -> None:
    """Measure, print and write the tables, and draw the contact sheet."""
    values = {name: measures.values(gallery, name) for name in tqdm(names, desc="measure", unit="row")}
    rows = {name: measures.row(name, values[name], gallery.seconds(name)) for name in names}
    compared = ("base", ABLATION, *PERTURBATIONS, MAIN, "amg strong")
    apart = ("base", *GUIDANCES, MAIN, *gates("nl2"))
    for chosen in ([name for name in table if name in rows] for table in (compared, apart)):
        print(markdown(pd.DataFrame([rows[name] for name in chosen]).round(3)) + "\n")
    write_atomically(out / "table.csv", pd.DataFrame(rows.values()).round(4).to_csv(index=False))
    write_atomically(out / "values.csv", measures.frame(values).to_csv(index=False))
    chosen = np.flatnonzero(measures.memorized)[::images][:14]
    strips = {row: np.concatenate(list(gallery.batches(row)))[chosen] for row in SHOWN if row in rows}
    measures.copying.sheet(strips, out / "sheet.png")


def main(arguments: Arguments = None) -> None:
    args = parse(arguments)
    spec = find_model(args.model)
    if not spec.clip:
        raise InputError(f"{spec.name}: needs a CLIP checkpoint in its config, for the text alignment")
    subject = open_subject(args, "amg", pictures=True)
    ablated = args.ablated and load_pipeline(
        find_model(args.ablated), subject.settings["dtype"], subject.pipe.device, pictures=True
    )
    listed = args.prompts or ROOT / spec.prompts["prompts"]
    frame = subject.frame.assign(picture=picture_files(subject.frame, listed))
    frame = chosen_prompts(frame, args.memorized, args.ordinary)
    if not 0 < (frame["label"] == 1).sum() < len(frame):
        raise InputError(f"{listed}: no memorized prompt with a training picture, or no other one, among the chosen")
    amg = {**spec.settings_of("mitigations").get(AMG.name, {}), "index": str(args.index or own_index(spec))}
    nearest = AMG(**amg).nearest()
    rows = methods(amg) | parts(amg, nearest.measure)
    settings = {
        **subject.settings, **{name: vars(args)[name] for name in ("memorized", "ordinary", "images", "steps")},
        "guidance_scale": spec.guidance_scale, "amg": AMG(**amg).record(), "ablated": ablated and revision_of(ablated),
        "rows": {name: mitigation and {**vars(mitigation), "index": ""} for name, mitigation in rows.items()},
    }  # fmt: skip
    rows = chosen_rows(rows, args.rows)
    measures = make_measures(subject, frame, args, nearest.index)
    with ResultStore(subject.out, settings, {}) as store:
        gallery = Gallery(store)
        fill(gallery, subject, frame, args, rows, ablated)
    report(measures, gallery, [*rows, *([ABLATION] if ablated else [])], args.images, subject.out)
    draw_trajectory(cases_of(subject, subject.pipe, frame[:1], args)[0], AMG(**amg), subject.out / "trajectory.png")
    print(f"{subject.out}/table.csv, values.csv, sheet.png, trajectory.png")


if __name__ == "__main__":
    run_script(main)
