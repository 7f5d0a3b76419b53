"""The guard of a pipeline on trial: ``python -m memorization study guard --model testbed-eps``

Thresholds come from the ordinary prompts of the validation half; pictures are of the test half, drawn by the pipeline's
own call. For each rate of false alarms and each action: the share of copies that is still handed out, what happens to
ordinary prompts, seconds a picture. Rows ``attack`` draw embeddings that were optimised to copy and to stay below the
threshold. A killed study goes on where it stopped.
"""

from __future__ import annotations

import time
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd
import torch

from memorization.errors import InputError
from memorization.evaluation.metrics import family_weights
from memorization.flags import ArgumentParser, Arguments, names, run_script, value
from memorization.guard.attack import attack
from memorization.guard.calibrating import calibrate
from memorization.guard.hooks import MITIGATION, protect
from memorization.guard.thresholds import Thresholds, read_thresholds
from memorization.io.files import read_lines, write_atomically, writing
from memorization.io.prompts import ordinary, picture_files, read_prompts
from memorization.io.tables import markdown
from memorization.models.decoding import encode
from memorization.runs.store import ResultStore
from memorization.settings import Count, Rate
from memorization.similarity.judge import is_copy
from memorization.studies.compare import PLAIN, Batch, Comparison, Item, Made, Row
from memorization.studies.compare_prompts import Bench, add_comparison_arguments

ATTACK = "attack"


@dataclass(frozen=True)
class Guarded:
    """How a row's pictures are guarded: what :class:`.Row` wants of a mitigation.

    Attributes:
        strength: the rate of false alarms.
        iterations: of the attack, in rows of attacks.
    """

    action: str
    strength: float
    threshold: float
    mitigation: str
    iterations: int = 0

    def record(self) -> dict[str, Any]:
        """For the run's settings."""
        return asdict(self)


class Trial:
    """The pipeline, its prompts by kind, and its thresholds."""

    def __init__(self, args: Namespace) -> None:
        self.args, self.bench = args, Bench(args, "guard")
        self.pipe = self.bench.subject.pipe
        self.items = [("memorized" if item.label else "ordinary", item) for item in self.bench.items]
        if args.paraphrases:
            self.items += [("paraphrased", item) for item in paraphrases(args.paraphrases)[: args.memorized]]
        self.noise = self.pipe.pure_noise(self.bench.noises, args.seed)

    @property
    def options(self) -> dict[str, Any]:
        """Of the pipeline's call."""
        return {"num_inference_steps": self.args.steps, "guidance_scale": self.bench.spec.scale}

    def thresholds(self) -> Thresholds:
        """From the ordinary prompts of the validation half; kept in the study's folder."""
        path = self.bench.out / "thresholds.yaml"
        if path.exists():
            return read_thresholds(path)
        prompts, families = ordinary(self.bench.subject.listed)
        found = calibrate(self.pipe, prompts, families=families, fpr=max(self.args.rates), **self.options)
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        found.save(path)
        return found

    def rows(self, known: Thresholds) -> list[Row]:
        """Plain sampling, each action at each rate, and an attack at each rate."""
        found = [Row(PLAIN, PLAIN)]
        for rate in self.args.rates:
            plain = Guarded("", rate, known.at(rate).value, self.args.mitigation)
            for action in self.args.actions:
                found.append(Row(f"{action} {rate:g}", action, cast(Any, replace(plain, action=action))))
            if self.args.attack:
                attacked = replace(plain, action="warn", iterations=self.args.attack)
                found.append(Row(f"{ATTACK} {rate:g}", ATTACK, cast(Any, attacked)))
        return found

    def batches(self, known: Thresholds, row: Row) -> list[Batch]:
        """An item each."""
        return [Batch([item], partial(self._make, known, row, number)) for number, (_, item) in enumerate(self.items)]

    def _make(self, known: Thresholds, row: Row, number: int) -> list[Made]:
        kind, item = self.items[number]
        guarded = cast(Guarded | None, row.mitigation)
        embeds = self._embeds(guarded, kind, item, known, number)
        started = time.perf_counter()
        verdicts: list[Any] = []
        if guarded is None:
            pictures = self._draw(item, embeds)
        else:
            generator = torch.Generator().manual_seed(self.args.seed + number)
            with protect(self.pipe, known, fpr=guarded.strength, action=guarded.action, generator=generator,
                         mitigation=guarded.mitigation) as guard:  # fmt: skip
                pictures, verdicts = self._draw(item, embeds), guard.verdicts
        seconds = round((time.perf_counter() - started) / len(pictures), 4)
        line = {"kind": kind, **self.bench.judge(pictures, item.prompt, item.image), "seconds": seconds}
        if verdicts:
            line |= {"flagged": [verdict.flagged for verdict in verdicts],
                     "delivered": [verdict.action != "blank" for verdict in verdicts],
                     "score": [verdict.score for verdict in verdicts]}  # fmt: skip
        return [Made(pictures, line)]

    def _draw(self, item: Item, embeds: torch.Tensor | None) -> np.ndarray:
        """uint8 ``(noises, h, w, 3)``, by the pipeline's own call."""
        noises = len(self.noise)
        asked = {"prompt": item.prompt} if embeds is None else {"prompt_embeds": embeds}
        made: Any = self.pipe(**asked, num_images_per_prompt=noises, latents=self.noise, output_type="np",
                              generator=torch.Generator().manual_seed(self.args.seed), **self.options)  # fmt: skip
        return (made.images * 255).round().astype(np.uint8)

    def _embeds(
        self, guarded: Guarded | None, kind: str, item: Item, known: Thresholds, number: int
    ) -> torch.Tensor | None:
        """What the attacker gives instead of the prompt; None where nobody attacks."""
        if guarded is None or not guarded.iterations or kind != "memorized" or item.image is None:
            return None
        with torch.no_grad():
            embeds, picture = self.pipe.embed([item.prompt or ""]), encode(self.pipe, [str(item.image)])
        return attack(
            self.pipe, embeds, picture, self.noise[:1], guarded.threshold, known.conditions.timesteps[0],
            iterations=guarded.iterations, generator=torch.Generator().manual_seed(self.args.seed + number),
        ).to(embeds)  # fmt: skip


def paraphrases(path: Path) -> list[Item]:
    """Of a list with the paraphrases and, in its column ``image``, the training picture of each.

    Raises:
        InputError: a line names no picture.
    """
    frame = read_prompts(path)
    pictures = picture_files(frame, path)
    if None in pictures:
        raise InputError(f"{path}: every paraphrase needs its training picture, in a column 'image'")
    families = frame["family"] if "family" in frame else frame["prompt"]
    return [Item(*values) for values in zip(frame["prompt"], [1] * len(frame), families, pictures, strict=True)]


def table_of(lines: pd.DataFrame, limits: dict[str, float], resamples: int) -> pd.DataFrame:
    """A row a row of the study and kind of prompt.

    Returns:
        ``flagged``, share of pictures; of prompts that are not ordinary ``copies``, the share of pictures that are
        copies and handed out, with its 95% interval over families (of attacks: handed out without a word); ``moved``,
        how far pictures went from plain ones; ``clip`` and ``seconds`` a picture.
    """
    measure = next(name for name in limits if name in lines)
    found = []
    for name, kind in dict.fromkeys(zip(lines["row"], lines["kind"], strict=True)):
        own = lines[(lines["row"] == name) & (lines["kind"] == kind)]
        if name.startswith(ATTACK) and kind != "memorized":
            continue
        values, flagged = np.array(own[measure].tolist()), _shares(own, "flagged", False)
        copies = is_copy(measure, values, limits[measure]) & _shares(own, "delivered", True)
        if name.startswith(ATTACK):
            copies &= ~flagged
        row = {"row": name, "kind": kind, "prompts": len(own), "flagged": flagged.mean() if name != PLAIN else None}
        if kind != "ordinary":
            weights = family_weights(own["family"].to_numpy(), None, resamples)
            low, high = np.percentile(weights @ copies.mean(1) / weights.sum(1), [2.5, 97.5])
            row |= {"copies": copies.mean(), "low": low, "high": high}
        clip = np.concatenate(own["clip"].tolist()).mean() if "clip" in own and own["clip"].notna().all() else None
        found.append(row | {"moved": own["moved"].mean(), "clip": clip, "seconds": own["seconds"].mean()})
    return pd.DataFrame(found)


def _shares(lines: pd.DataFrame, column: str, default: bool) -> np.ndarray:
    """``(prompts, noises)``; ``default`` where no guard said anything."""
    if column not in lines or lines[column].isna().any():
        return np.full((len(lines), 1), default)
    return np.array(lines[column].tolist(), dtype=bool)


def rates(text: str) -> list[float]:
    """``0.01,0.05``."""
    return [value(Rate)(part) for part in names(text)]


def parse(arguments: Arguments = None) -> Namespace:
    """The flags, checked."""
    parser = ArgumentParser(description=__doc__)
    add_comparison_arguments(parser, memorized=16)
    add = parser.add_argument
    # fmt: off
    add("--rates", type=rates, default=[0.01, 0.05], metavar="A,B", help="of false alarms (default: 0.01,0.05)")
    add("--actions", type=names, default=["reseed", "mitigate", "blank"], metavar="A,B", help="of the guard, "
        "all but refuse (default: reseed,mitigate,blank)")
    add("--mitigation", default=MITIGATION, metavar="NAME", help="of the action mitigate (default: %(default)s)")
    add("--paraphrases", type=Path, metavar="FILE", help="a list of paraphrases, each with its training picture in a "
        "column image (default: none)")
    add("--attack", type=value(Count), metavar="N", help="steps of an attack on each memorized prompt (default: none)")
    # fmt: on
    args = parser.parse_args(arguments)
    if "refuse" in args.actions:
        parser.error("--actions: refuse hands out nothing to measure; blank hands out the same")
    return args


def draw_all(trial: Trial, args: Namespace) -> pd.DataFrame:
    """The lines of all rows."""
    known = trial.thresholds()
    settings = {**trial.bench.settings, "paraphrases": str(args.paraphrases), "scores": list(known.scores)}
    with ResultStore(trial.bench.out, settings, {}) as store:
        comparison = Comparison(store, trial.bench.limits)
        for row in trial.rows(known):
            comparison.fill(row, trial.batches(known, row))
    return pd.DataFrame(read_lines(trial.bench.out / "scores.jsonl")[0])


def report(lines: pd.DataFrame, limits: dict[str, float], resamples: int, folder: Path) -> Sequence[str]:
    """Write ``table.csv``; the lines to print."""
    table = table_of(lines, limits, resamples)
    write_atomically(folder / "table.csv", table.round(4).to_csv(index=False))
    return [markdown(table.round(3).astype(object).where(table.notna(), "")), f"{folder}/table.csv"]


def main(arguments: Arguments = None) -> None:
    """Parse, draw, print."""
    args = parse(arguments)
    trial = Trial(args)
    lines = draw_all(trial, args)
    print("\n".join(report(lines, trial.bench.limits, args.resamples, trial.bench.out)))


if __name__ == "__main__":
    run_script(main)
