"""Every mitigation at five strengths: ``python -m memorization.studies.mitigation_tradeoff --model testbed-eps``

On memorized and on ordinary prompts of a labelled list, all from the same noise: how many pictures are still copies,
against how well they fit the prompt; what the method does to ordinary prompts, which need none; seconds a prompt.
Intervals resample families. A killed study goes on where it stopped, and other methods may be added to a finished one.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from tqdm import tqdm

from memorization.errors import InputError
from memorization.evaluation.calibration import Calibration, read_calibration
from memorization.flags import ArgumentParser, Arguments, run_script
from memorization.io.figures import save_figure
from memorization.io.files import read_lines, write_atomically
from memorization.io.pictures import to_tensor
from memorization.io.prompts import picture_files, read_prompts
from memorization.io.tables import markdown
from memorization.mitigations.base import MITIGATIONS, Mitigation, make_mitigation
from memorization.models.spec import ModelSpec
from memorization.paths import ROOT
from memorization.runs.cases import Cases, scoring_detectors
from memorization.runs.memory import default_batch_size
from memorization.runs.mitigate import configured_mitigation
from memorization.runs.outcome import Outcome, Side, mitigate
from memorization.runs.store import ResultStore
from memorization.similarity.judge import Judge, make_judge
from memorization.studies.labelled import Subject, add_arguments, open_subject


class Plan(NamedTuple):
    """One method at one strength."""

    method: str
    strength: float

    def mitigation(self, spec: ModelSpec) -> Mitigation:
        """The mitigation, with the model's settings."""
        return configured_mitigation(self.method, {"strength": self.strength}, spec)


def plans(methods: list[str]) -> list[Plan]:
    """Every method at each of its strengths."""
    return [Plan(name, strength) for name in methods for strength in make_mitigation(name).strengths]


def chosen_prompts(frame: pd.DataFrame, memorized: int, ordinary: int) -> pd.DataFrame:
    """As many prompts of either label, drawn by a seed; the memorized ones with a training picture."""
    mixed = frame.sample(frac=1, random_state=0)
    copied = mixed[(mixed["label"] == 1) & mixed["picture"].notna()].head(memorized)
    return pd.concat([copied, mixed[mixed["label"] == 0].head(ordinary)]).reset_index(drop=True)


class Study:
    """What all plans share: cases, and each of them without any remedy, made once."""

    def __init__(self, subject: Subject, frame: pd.DataFrame, judge: Judge, calibration: Calibration, args) -> None:
        pipe, spec = subject.pipe, subject.spec
        self.every = [configured_mitigation(name, {}, spec) for name in MITIGATIONS]
        cases = Cases(
            pipe, pipe.pure_noise(calibration.holds_for["num_images"], args.seed), args.steps, spec.guidance_scale,
            args.seed, default_batch_size(pipe), scoring_detectors(self.every, spec, calibration), calibration.levels,
            calibration.holds_for["steps"],
        )  # fmt: skip
        self.judge, self.spec = judge, spec
        self.made: dict[Plan, Mitigation] = {}
        self.parts = [frame.iloc[start : start + cases.at_once] for start in range(0, len(frame), cases.at_once)]
        self.cases = cases.batches(frame["prompt"].tolist())
        self.before: dict[int, Side] = {}

    def rows(self, plan: Plan, number: int) -> list[dict]:
        """Lines of one plan on case ``number``."""
        case, part = self.cases[number], self.parts[number]
        if plan not in self.made:
            self.made[plan] = plan.mitigation(self.spec)
        outcome = mitigate(
            case,
            self.made[plan],
            self.judge,
            part["picture"].tolist(),
            self.before.get(number),
        )
        self.before[number] = outcome.before
        kept = part[["label", "family"]].to_dict("records")
        rows = zip(kept, outcome.rows(case.prompts), distance_moved(outcome), strict=True)
        return [{**plan._asdict(), **own, **row, "moved": moved} for own, row, moved in rows]


def distance_moved(outcome: Outcome) -> list[float]:
    """Mean root mean square difference between the pictures before and after, in [0, 2], a value a prompt."""
    pairs = zip(outcome.before.pictures, outcome.after.pictures, strict=True)
    return [round((to_tensor(a) - to_tensor(b)).square().mean((1, 2, 3)).sqrt().mean().item(), 4) for a, b in pairs]


def run(study: Study, todo: list[Plan], store: ResultStore) -> None:
    """All plans on all cases, but for what the store has already."""
    have = {(*(row[key] for key in todo[0]._fields), row["prompt"]) for row in read_lines(store.scores)[0]}
    pieces = [
        (plan, number) for plan in todo for number, part in enumerate(study.parts)
        if not all((*plan, prompt) in have for prompt in part["prompt"])
    ]  # fmt: skip
    if pieces:
        store.start()
    for plan, number in tqdm(pieces, desc=store.folder.name, unit="case", disable=not pieces):
        new = [row for row in study.rows(plan, number) if (*plan, row["prompt"]) not in have]
        store.append([{"id": store.done + i, **row} for i, row in enumerate(new)])


def resampled_mean(values: np.ndarray, weights: np.ndarray) -> tuple[float, float, float]:
    """Mean of ``values (rows,)`` and its 95% interval by bootstrap ``weights (b, rows)``."""
    means = weights @ values / weights.sum(1)
    return float(values.mean()), *(float(q) for q in np.percentile(means, [2.5, 97.5]))


def table_of(rows: pd.DataFrame, fields: Sequence[str], copy: float, resamples: int) -> pd.DataFrame:
    """A row a plan, ``none`` first.

    Args:
        fields: what tells plans apart.
        copy: normalised l2 below which a picture is a copy of the training picture.
    """
    groups = list(rows.groupby(list(fields), sort=False))
    found = [{fields[0]: "none", **_row(groups[0][1], "before", copy, resamples)}]
    for values, group in groups:
        found.append({**dict(zip(fields, values, strict=True)), **_row(group, "after", copy, resamples)})
    return pd.DataFrame(found)[[*fields, *(key for key in found[1] if key not in fields)]]


def _row(rows: pd.DataFrame, when: str, copy: float, resamples: int) -> dict:
    memorized, ordinary = rows[rows["label"] == 1], rows[rows["label"] == 0]
    weights = family_resamples(memorized["family"].to_numpy(), resamples)
    nl2, clip = (np.array(memorized[f"{key}_{when}"].tolist()) for key in ("nl2", "clip"))
    copies = resampled_mean((nl2 < copy).mean(1), weights)
    alignment = resampled_mean(clip.mean(1), weights)
    row = {
        "copies": copies[0], "copies low": copies[1], "copies high": copies[2],
        "clip": alignment[0], "clip low": alignment[1], "clip high": alignment[2],
        "nl2 < 1.4": (nl2 < 1.4).mean(), "nl2 5%": np.quantile(nl2, 0.05), "nl2 lowest": nl2.min(),
    }  # fmt: skip
    if f"sscd_{when}" in memorized and memorized[f"sscd_{when}"].notna().all():
        sscd = np.array(memorized[f"sscd_{when}"].tolist())
        row |= {"sscd > .5": (sscd > 0.5).mean(), "sscd top 5%": np.quantile(sscd, 0.95), "sscd highest": sscd.max()}
    if when == "after":
        change = np.array(ordinary["clip_after"].tolist()) - np.array(ordinary["clip_before"].tolist())
        row |= {"ordinary: clip change": change.mean(), "ordinary: picture change": ordinary["moved"].mean(),
                "score": memorized["score_after"].mean() if "score_after" in memorized else np.nan,
                "seconds": memorized["seconds"].median(),
                "seconds to generate": memorized["seconds_generation"].median()}  # fmt: skip
    return row


def at_equal_alignment(table: pd.DataFrame, kept: float = 0.9) -> pd.DataFrame:
    """The lowest share of copies that every method reaches while it keeps a share ``kept`` of the text alignment.

    On its curve from no mitigation through its strengths, mild to strong, linear between them; best method first.
    """
    none = table.iloc[0]
    wanted, found, column = kept * none["clip"], [], f"copies at {kept:.0%} of the alignment"
    for method, group in table.iloc[1:].groupby("method", sort=False):
        clip = np.array([none["clip"], *group["clip"]])
        copies = np.array([none["copies"], *group["copies"]])
        reached = list(copies[clip >= wanted])
        for i in np.flatnonzero((clip[:-1] >= wanted) != (clip[1:] >= wanted)):  # the curve crosses it here
            part = (clip[i] - wanted) / (clip[i] - clip[i + 1])
            reached.append(copies[i] + part * (copies[i + 1] - copies[i]))
        found.append({"method": method, column: min(reached)})
    return pd.DataFrame(found).sort_values(column)


def family_resamples(families: np.ndarray, resamples: int) -> np.ndarray:
    """How often each row's family was drawn, ``(resamples, rows)``: as many as there are, with replacement."""
    _, member = np.unique(families, return_inverse=True)
    count = member.max() + 1
    rng = np.random.default_rng(0)
    return np.stack([np.bincount(rng.integers(count, size=count), minlength=count)[member] for _ in range(resamples)])


def draw(table: pd.DataFrame, path: Path, title: str) -> None:
    """Share of copies against text alignment, a line a method; the best corner is below, on the right."""
    figure, axis = plt.subplots(figsize=(8, 5.4))
    none = table[table["method"] == "none"].iloc[0]
    axis.plot(none["clip"], none["copies"], "k*", markersize=14, label="no mitigation")
    for i, (method, group) in enumerate(table[table["method"] != "none"].groupby("method", sort=False)):
        bars = np.abs(group[["copies low", "copies high"]].to_numpy().T - group["copies"].to_numpy())
        style = "os^DvP*X<>hd"[i % 12] + ("-" if i < 10 else "--")
        axis.errorbar(group["clip"], group["copies"], yerr=bars, fmt=style, color=f"C{i % 10}", markersize=5,
                      elinewidth=0.5, label=method)  # fmt: skip
    axis.set(xlabel="text alignment (CLIP score)", ylabel="share of pictures that are copies", title=title)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    save_figure(figure, path)


def add_study_arguments(parser: ArgumentParser) -> None:
    """Flags of every study that mitigates a sample of a labelled list."""
    add_arguments(parser)
    parser.set_defaults(split="test")
    add = parser.add_argument
    add("--memorized", type=int, default=16, metavar="N", help="prompts that are memorized (default: %(default)s)")
    add("--ordinary", type=int, default=8, metavar="N", help="prompts that are not (default: %(default)s)")
    add("--steps", type=int, default=15, help="of a generation (default: %(default)s)")
    add("--resamples", type=int, default=1000, help="bootstrap resamples (default: %(default)s)")


def make_study(args: argparse.Namespace, name: str) -> tuple[Study, dict, Path, float]:
    """(study, what its rows depend on, its folder, normalised l2 below which a picture is a copy).

    Raises:
        InputError: the flags make no sense, or the model's config lacks what is needed.
    """
    if min(args.memorized, args.ordinary) < 1 or not 3 <= args.steps <= 500:
        raise InputError("--memorized and --ordinary are at least 1, --steps from 3 to 500")
    subject = open_subject(args, name, pictures=True)
    spec = subject.spec
    if not (spec.calibration and spec.clip and "nl2" in spec.copy_limits and "image" in subject.frame):
        raise InputError(f"{spec.name}: needs a calibration, clip and copy_limits in its config, and training pictures")
    listed = args.prompts or ROOT / spec.prompts["prompts"]
    subject.frame["picture"] = picture_files(subject.frame, listed)
    frame = chosen_prompts(subject.frame, args.memorized, args.ordinary)
    known = [picture for picture in picture_files(read_prompts(listed), listed) if picture]
    judge, calibration = make_judge(subject.pipe, known, spec.clip), read_calibration(ROOT / spec.calibration)
    study = Study(subject, frame, judge, calibration, args)
    settings = {
        **subject.settings, "steps": args.steps,
        "memorized": args.memorized, "ordinary": args.ordinary,
        "guidance_scale": spec.guidance_scale, "num_images": calibration.holds_for["num_images"],
        "levels": calibration.levels, "judge": judge.description,
        **{mitigation.name: mitigation.record() for mitigation in study.every if mitigation.needs_index},
    }  # fmt: skip
    return study, settings, subject.out, spec.copy_limits["nl2"]


def main(arguments: Arguments = None) -> None:
    parser = ArgumentParser(description=__doc__)
    add_study_arguments(parser)
    parser.add_argument(
        "--methods", default="all", metavar="A,B|all", help=f"of {', '.join(MITIGATIONS)} (default: all)"
    )
    args = parser.parse_args(arguments)
    todo = plans(list(MITIGATIONS) if args.methods == "all" else args.methods.split(","))
    study, settings, out, copy = make_study(args, "mitigation_tradeoff")
    with ResultStore(out, settings, {}) as store:
        run(study, todo, store)
    rows = pd.DataFrame(read_lines(out / "scores.jsonl")[0])
    table = table_of(rows, Plan._fields, copy, args.resamples)
    print(markdown(table.round(3).astype(object).fillna("")))
    print(markdown(at_equal_alignment(table).round(3)))
    write_atomically(out / "table.csv", table.round(4).to_csv(index=False))
    title = f"{args.model}: {args.memorized} memorized prompts, {settings['num_images']} noises each"
    draw(table, out / "tradeoff.png", title)
    print(f"{out}/table.csv, tradeoff.png")


if __name__ == "__main__":
    run_script(main)
