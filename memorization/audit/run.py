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
from memorization.io.files import write_atomically, writing
from memorization.models.loading import Model, revision_of
from memorization.runs.store import ResultStore
from memorization.settings import Checked, Rate
from memorization.similarity.clip import Clip

FINDINGS = ("audit.json", "epochs.csv", "pictures.csv")  # computed from the lines


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
        "measures": {measure.name: measure.revision for measure in measures}, "decides": measures[0].name,
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

    Epochs may be added at the end later: a folder whose epochs begin otherwise is refused. The run counts as complete
    once everything is written.

    Raises:
        InputError: the folder holds another audit, or an adapter does not fit.
    """
    if not adapters:
        raise InputError("no adapter to audit")
    tries = len(prepared.audit.tries)
    with ResultStore(out, prepared.settings, {"device": device}, overwrite) as store:
        epochs = [{"name": adapter.name, "revision": adapter.revision} for adapter in adapters]
        begun = max(0, -(-store.done // tries) - 1)  # an epoch without a line, as one that did not fit, may go
        _check_epochs(store.record.get("epochs", [])[:begun], epochs, out)
        store.record |= {"epochs": epochs, "training": files_of(prepared.training)}
        if store.lacks((1 + len(epochs)) * tries):
            store.start()
            _forget_findings(out, pictures=store.done == 0)
            prepared.audit.run(adapters, store)
        found = findings(store.rows, prepared.training, prepared.measures, DEFAULT_SIGNAL, prepared.rate)
        write(found, out)
    return found


def _check_epochs(earlier: list[dict], epochs: list[dict], out: Path) -> None:
    """See that those which have lines come first, as they were.

    Raises:
        InputError: they do not; says which, and what to do.
    """
    if epochs[: len(earlier)] == earlier:
        return
    revisions = {one["name"]: one["revision"] for one in epochs}
    other = "put back what was audited, or give another --out; --overwrite forgets what was audited"
    if gone := [one["name"] for one in earlier if one["name"] not in revisions]:
        raise InputError(f"{out}: epoch {gone[0]} was audited there and is not given any more ({len(gone)} such); "
                         f"{other}")  # fmt: skip
    if changed := [one["name"] for one in earlier if revisions[one["name"]] != one["revision"]]:
        raise InputError(f"{out}: epoch {changed[0]} is not the file that was audited there; {other}")
    first = next(new["name"] for one, new in zip(earlier, epochs, strict=False) if one != new)
    raise InputError(f"{out}: epoch {first} comes before others that were audited there, and epochs are added at the "
                     "end; give another --out")  # fmt: skip


def files_of(training: Training) -> list[dict]:
    """Of the training pictures, for the record: where they lie, wherever it is read from."""
    return [
        {"name": name, "file": str(file.resolve()), "sha256": digest}
        for name, file, digest in zip(training.names, training.files, training.hashes(), strict=True)
    ]


def _forget_findings(out: Path, *, pictures: bool) -> None:
    """Remove what was computed from fewer lines; ``pictures`` too where there are no lines any more."""
    old = [out / name for name in FINDINGS] + (list((out / "pictures").glob("*.png")) if pictures else [])
    with writing(out):
        for path in old:
            path.unlink(missing_ok=True)


def write(found: dict, out: Path) -> None:
    """``audit.json`` and the two tables."""
    as_json = json.dumps(found, indent=1, ensure_ascii=False) + "\n"
    tables = [table(found).to_csv(index=False) for table in (epochs_table, pictures_table)]
    for name, content in zip(FINDINGS, [as_json, *tables], strict=True):
        write_atomically(out / name, content)


def epochs_table(found: dict) -> pd.DataFrame:
    """A row an epoch: share of copies with its interval by kind of try, and text alignment."""
    rows = []
    for one in found["epochs"]:
        row = {"epoch": one["name"]}
        for kind, share in one["copies"].items():
            row |= {f"{kind}: {key}": share[key] for key in ("copies", "pictures", "share", "low", "high")}
        rows.append(row | {key: one[key] for key in ("gained", "lost")} | {"text alignment": one["alignment"]})
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
    known: Sequence[Adapter] = ()
    while True:
        try:
            adapters = look()
        except InputError as error:
            print(printable(f"waiting: {error}"), file=sys.stderr)
            adapters = known
        if any(adapter not in known for adapter in adapters):
            audit(adapters)
            known = adapters
        wait()
