"""An audit from its inputs to its folder: ``scores.jsonl``, ``run.json``, ``audit.json``, ``epochs.csv``,
``pictures.csv`` and ``pictures/``."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from memorization.audit.adapters import Adapter, Tuned
from memorization.audit.engine import Audit, Plan
from memorization.audit.findings import findings
from memorization.audit.measures.base import Known, Measure, make_measures
from memorization.audit.signals.base import DEFAULT_SIGNAL, SIGNALS
from memorization.audit.training import Training, read_training
from memorization.audit.tries import tries_of
from memorization.errors import InputError, printable
from memorization.io.files import write_atomically
from memorization.models.loading import Model, revision_of
from memorization.runs.store import ResultStore
from memorization.settings import Checked, Rate
from memorization.similarity.clip import Clip


@dataclass(frozen=True)
class Asked(Checked):
    """What a user asks of an audit beside base, adapters, folder and plan.

    Args:
        trigger: the trigger word; None to take the words that all captions begin with.
        own: prompts of the user's.
        paraphrases: of each caption.
        rate: how much of the base's own pictures may count as copies.
        measure: that decides; None for the first that can be had.
    """

    trigger: str | None = None
    own: tuple[str, ...] = ()
    paraphrases: int = 1
    rate: Rate = 0.01
    measure: str | None = None
    sscd: str = "official-288"
    clip: str | None = None


@dataclass(frozen=True)
class Prepared:
    """What is made ready once for all epochs."""

    audit: Audit
    training: Training
    measures: Sequence[Measure]
    settings: dict
    rate: float


def prepare(model: Model, folder: Path, plan: Plan, asked: Asked) -> Prepared:
    """Read the training set and make tries, measures and signals.

    Raises:
        InputError: something of them is wrong.
    """
    pipe = model.pipe
    height, width = (side * pipe.vae_scale_factor for side in pipe.pure_noise(1, 0).shape[2:])
    training = read_training(folder, (height, width))
    clip = asked.clip or model.spec.clip
    network = Clip(clip, pipe.device) if clip and clip != "none" else None
    measures = _deciding_first(make_measures(Known(training.pictures, network, asked.sscd)), asked.measure)
    signals = [SIGNALS.make(name) for name in SIGNALS]
    tries = tries_of(training, asked.trigger, asked.own, asked.paraphrases, plan.seed)
    settings = {
        "model": model.name, "revision": revision_of(pipe, pictures=True), "dtype": model.dtype,
        "training": training.revision, "tries": [[one.prompt, one.kind] for one in tries], **vars(plan),
        "signals": {signal.name: signal.record() for signal in signals},
        "measures": {measure.name: measure.revision for measure in measures},
        "alignment": network.revision if network else None, "rate": asked.rate,
    }  # fmt: skip
    audit = Audit(Tuned(model), training, tries, signals, measures, plan, network)
    return Prepared(audit, training, measures, settings, asked.rate)


def _deciding_first(measures: list[Measure], name: str | None) -> list[Measure]:
    names = [measure.name for measure in measures]
    if name is None:
        return measures
    if name not in names:
        raise InputError(f"--measure {name}: cannot be had here; there are: {', '.join(names)}")
    return sorted(measures, key=lambda measure: measure.name != name)


def run_audit(
    prepared: Prepared, adapters: Sequence[Adapter], out: Path, *, device: str, overwrite: bool = False
) -> dict:
    """Audit the base and all adapters into a folder, from where it stopped; gives back what was found.

    Epochs may be added at the end later: a folder whose epochs begin otherwise is refused.

    Raises:
        InputError: the folder holds another audit, or an adapter does not fit.
    """
    if not adapters:
        raise InputError("no adapter to audit")
    with ResultStore(out, prepared.settings, {"device": device}, overwrite) as store:
        epochs = [{"name": adapter.name, "revision": adapter.revision} for adapter in adapters]
        earlier = store.record.get("epochs", [])
        if earlier[: len(epochs)] != epochs[: len(earlier)]:
            changed = next(one["name"] for one, new in zip(earlier, epochs, strict=False) if one != new)
            raise InputError(f"{out}: holds an audit of other epochs, from {changed} on; --overwrite, or another --out")
        store.record["epochs"] = max(earlier, epochs, key=len)
        store.record["training"] = [
            {"name": name, "file": str(file), "sha256": digest}
            for name, file, digest in zip(
                prepared.training.names, prepared.training.files, prepared.training.hashes(), strict=True
            )
        ]
        prepared.audit.run(adapters, store)
        rows = store.rows
    found = findings(rows, prepared.training, prepared.measures, DEFAULT_SIGNAL, prepared.rate)
    write(found, out)
    return found


def write(found: dict, out: Path) -> None:
    """``audit.json`` and the two tables."""
    write_atomically(out / "audit.json", json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    write_atomically(out / "epochs.csv", epochs_table(found).to_csv(index=False))
    write_atomically(out / "pictures.csv", pictures_table(found).to_csv(index=False))


def epochs_table(found: dict) -> pd.DataFrame:
    """A row an epoch: share of copies with its interval by kind of try, and text alignment."""
    rows = []
    for one in found["epochs"]:
        row = {"epoch": one["name"]}
        for kind, share in one["copies"].items():
            row |= {f"{kind}: {key}": share[key] for key in ("copies", "pictures", "share", "low", "high")}
        rows.append(row | {"text alignment": one["alignment"]})
    return pd.DataFrame(rows)


def pictures_table(found: dict) -> pd.DataFrame:
    """A row a training picture and epoch."""
    return pd.DataFrame(
        [{"training": picture["training"], "epoch": epoch, **one}
         for picture in found["pictures"] for epoch, one in picture["epochs"].items()]
    )  # fmt: skip


def watch(look: Callable[[], Sequence[Adapter]], audit: Callable[[Sequence[Adapter]], None], wait: Callable) -> None:
    """Audit what a trainer has saved so far, again whenever there is more; ends when it is interrupted.

    Args:
        look: finds the adapters; an InputError means that one is still being written.
        audit: is given them all.
        wait: between two looks.
    """
    known = 0
    while True:
        try:
            adapters = look()
        except InputError as error:
            print(printable(f"waiting: {error}"), file=sys.stderr)
            adapters = []
        if len(adapters) > known:
            audit(adapters)
            known = len(adapters)
        wait()
