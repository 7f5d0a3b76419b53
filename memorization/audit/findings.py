"""What the lines of an audit say: limits, shares of copies with intervals, a verdict a picture, an epoch to keep.

Everything is computed from the lines and the training set, so that it can be computed again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from memorization.audit.engine import BASE
from memorization.audit.measures.base import Measure
from memorization.audit.training import Training
from memorization.audit.tries import KINDS
from memorization.evaluation.intervals import lower_end, share_interval, upper_end
from memorization.index.duplicates import NEAR_COPY

CONFIDENCE = 0.95
KNOWN = 3  # pictures of a training picture, at least, for the base to draw it itself
STEEPEST = 8.0  # as which distances of training pictures are continued
VERDICTS = ("copied", "at risk", "not seen to be copied")


@dataclass(frozen=True)
class Limit:
    """A number that decides something, and where it comes from. ``value`` None: nothing to take it from."""

    decides: str
    value: float | None
    source: str


@dataclass(frozen=True)
class Share:
    """Copies among generated pictures; None where no picture was generated."""

    copies: int
    pictures: int
    share: float | None
    low: float | None
    high: float | None

    @classmethod
    def of(cls, copied: np.ndarray) -> Share:
        """Of booleans, a generated picture each."""
        if not copied.size:
            return cls(0, 0, None, None, None)
        share, low, high = share_interval(int(copied.sum()), copied.size, CONFIDENCE)
        return cls(int(copied.sum()), copied.size, share, low, high)


@dataclass(frozen=True)
class CopyLimits:
    """From where on a generated picture counts as a copy of the training picture that it is nearest to.

    Attributes:
        of: ``(training pictures,)``, by training picture.
        usual: that of most of them.
        known: families that the base draws itself -> (their limit, the base's pictures beyond the usual one).
    """

    of: np.ndarray
    usual: Limit
    known: Mapping[int, tuple[float, int]]


def copy_limits(
    measure: Measure, base: np.ndarray, nearest: np.ndarray, families: np.ndarray, rate: float
) -> CopyLimits:  # fmt: skip
    """A picture counts as a copy if it is nearer than the nearer of two limits.

    So that neither what the base draws anyway nor what pictures of one concept have in common counts: the base's own
    pictures, made of the same tries from the same noise, at most a share ``rate`` of which lies beyond; and
    :func:`spacing_limit`. A training picture that the base draws itself (:func:`known_families`) has a limit of its
    own, by the base's pictures of it, or it would use up the share of all others.

    Args:
        base: values of the base's pictures.
        nearest: the training pictures that they are nearest to.
        families: of the training pictures.
    """
    sign = 1 if measure.lower_is_nearer else -1
    values, owners = sign * base, families[nearest]
    own = known_families(values, owners, rate)
    rest = values[~np.isin(owners, own)]
    of_base, of_training = beyond(rest, rate), sign * measure.value_at(spacing_limit(measure, families, rate))
    side = "below" if measure.lower_is_nearer else "above"
    if of_base <= of_training:
        source = (f"the base's own pictures: {int((rest < of_base).sum())} of {len(rest)} lie beyond it (at most "
                  f"{rate:g} of them may)")  # fmt: skip
    else:
        source = (f"the training pictures' distances to one another, near-copies left out, continued to where a new "
                  f"picture of their kind is as near to one of them with a probability of {rate:g} (the base alone "
                  f"would give {sign * of_base:.4g})")  # fmt: skip
    usual = round(float(min(of_base, of_training)), 4)
    limits = {family: round(float(min(beyond(values[owners == family], rate), usual)), 4) for family in own}
    known = {family: (sign * limit, int((values[owners == family] < usual).sum())) for family, limit in limits.items()}
    by_picture = sign * np.array([limits.get(family, usual) for family in families.tolist()])
    return CopyLimits(by_picture, Limit(f"a copy: {measure.title} {side}", sign * usual, source), known)


def beyond(values: np.ndarray, rate: float) -> float:
    """The value beyond which (below which) at most a share ``rate`` of ``values`` lies."""
    return float(np.sort(values)[int(np.floor(rate * len(values) + 1e-9))])


def known_families(values: np.ndarray, owners: np.ndarray, rate: float) -> list[int]:
    """Families that the base draws more often than ``rate`` where it comes as near to hardly any other.

    Each of them has, alone, more than a share ``rate`` of all values (three at least) beyond the limit that the others
    give; the others have half of all values at least.

    Args:
        values: of the base's pictures, lower is nearer.
        owners: the families that they are nearest to.
    """
    most = max(KNOWN, int(np.floor(rate * len(values) + 1e-9)) + 1)
    own = {int(family): np.sort(values[owners == family]) for family in np.unique(owners)}
    order = sorted((float(near[most - 1]), family) for family, near in own.items() if len(near) >= most)
    for count in range(len(order), 0, -1):
        chosen = [family for _, family in order[:count]]
        rest = values[~np.isin(owners, chosen)]
        if 2 * len(rest) >= len(values) and order[count - 1][0] < beyond(rest, rate):
            return chosen
    return []


def spacing_limit(measure: Measure, families: np.ndarray, rate: float) -> float:
    """The distance within which a new picture of the same kind lies of one of the training pictures with a probability
    of at most ``rate``; infinite where there is one family alone.

    Of n families it is at most n F(t), where F(t) is the share of pairs nearer than t. Where it is ``rate``, there are
    hardly any pairs, so F is continued as t ** d from a sixteenth of the pairs, and from the second nearest at least,
    so that no single close pair decides. d is the slope between there and a quarter of the pairs (the correlation
    dimension, Grassberger and Procaccia, Physica D 9, 1983): F is steeper further in, so that the limit is too near
    rather than too far. Deviation: at most 8, since few pairs tell d badly.
    """
    apart = measure.distances(measure.apart())
    i, j = np.triu_indices(len(families), 1)
    pairs = np.minimum(apart, apart.T)[i, j][families[i] != families[j]]
    pairs = np.sort(pairs[np.isfinite(pairs)])
    if not len(pairs):
        return float("inf")
    low, high = (min(1 + len(pairs) // part, len(pairs) - 1) for part in (16, 4))
    near, far = (max(float(pairs[place]), 1e-9) for place in (low, high))
    slope = min(STEEPEST, np.log((high + 1) / (low + 1)) / np.log(far / near)) if far > near else STEEPEST
    share = (low + 1) / len(pairs)
    return near * min(1.0, rate / len(np.unique(families)) / share) ** (1 / slope)


def findings(
    rows: Sequence[Mapping], training: Training, measures: Sequence[Measure], signal: str, rate: float
) -> dict:
    """All of an audit's numbers, as ``audit.json`` holds them.

    Args:
        rows: its lines; those of an epoch that is not complete are left out.
        measures: the first decides what a copy is.
        signal: says which pictures are at risk.
        rate: how much of the base's own pictures may lie beyond the limit.
    """
    measure, names = measures[0], list(dict.fromkeys(row["epoch"] for row in rows))
    size = sum(row["epoch"] == BASE for row in rows)
    by_epoch = {name: own for name in names if len(own := [row for row in rows if row["epoch"] == name]) == size}
    nearest = f"{measure.name}_nearest"
    base, of = (np.concatenate([row[key] for row in by_epoch[BASE]]) for key in (measure.name, nearest))
    limits = copy_limits(measure, base, of, training.families, rate)
    near = np.less if measure.lower_is_nearer else np.greater
    copied = {
        name: [near(row[measure.name], limits.of[row[nearest]]) for row in own] for name, own in by_epoch.items()
    }  # fmt: skip
    epochs = [_epoch(name, own, copied[name], copied[BASE]) for name, own in by_epoch.items()]
    of_base = epochs[0]["copies"]
    # The base counts with its share, not its upper end: that few pictures say little of it excuses no copies.
    allowed = max(rate, of_base["caption"]["share"])
    floor = max(rate, upper_end(of_base["all"]["copies"], of_base["all"]["pictures"], CONFIDENCE))
    pictures = _pictures(by_epoch, copied, training, measure, floor)
    risk = _mark_risk(pictures, by_epoch, signal, training)
    copying = {name for picture in pictures for name, one in picture["epochs"].items() if one["verdict"] == VERDICTS[0]}
    clean = [one["name"] for one in epochs[1:]
             if one["copies"]["caption"]["low"] <= allowed and one["name"] not in copying]  # fmt: skip
    every = [
        limits.usual,
        Limit("an epoch copies more than the base: the lower end of its share of copies, among pictures of the "
              "captions, above", allowed, "the base's own share, or --fpr where that is more"),
        Limit("a picture is copied: the lower end of the share of copies of it, among pictures of its own prompts, "
              "above", float(f"{floor:.6g}"),
              "the upper end of the base's own share of copies, of all prompts, or --fpr where that is more"),
        risk,
        Limit("near-copies in the training folder: l2 at 64 x 64 below", NEAR_COPY, "the project's setting, by eye"),
    ]  # fmt: skip
    known = [
        {"training": [name for name, own in zip(training.names, training.families, strict=True) if own == family],
         "limit": limit, "drawn": drawn}
        for family, (limit, drawn) in limits.known.items()
    ]  # fmt: skip
    return {
        "measure": measure.name, "signal": signal, "limits": [asdict(one) for one in every], "known": known,
        "epochs": epochs,
        "recommended": clean[-1] if clean else None, "pictures": pictures,
    }  # fmt: skip


def _epoch(name: str, rows: Sequence[Mapping], copied: Sequence[np.ndarray], of_base: Sequence[np.ndarray]) -> dict:
    """Copies by kind of try, and text alignment, of an epoch.

    ``gained`` are pictures of the captions that are copies while the base's, of the same prompt and noise, are none;
    ``lost`` those the other way round.
    """
    kinds = np.array([row["kind"] for row in rows])
    flags, base = np.array(copied), np.array(of_base)
    captions = kinds == "caption"
    aligned = [value for row in rows if row["kind"] == "caption" for value in row.get("alignment", [])]
    return {
        "name": name,
        "copies": {"all": asdict(Share.of(flags)),
                   **{kind: asdict(Share.of(flags[kinds == kind])) for kind in KINDS if (kinds == kind).any()}},
        "gained": int((flags & ~base)[captions].sum()), "lost": int((base & ~flags)[captions].sum()),
        "alignment": round(float(np.mean(aligned)), 4) if aligned else None,
    }  # fmt: skip


def _pictures(
    by_epoch: Mapping[str, Sequence[Mapping]], copied: Mapping[str, Sequence[np.ndarray]], training: Training,
    measure: Measure, floor: float,
) -> list[dict]:  # fmt: skip
    """Of each training picture, by epoch, what was seen of it; and the verdict, as far as copies alone decide it.

    Copied: of the pictures of its own tries so many are copies of it that the lower end of their share lies above
    ``floor``, the upper end of the base's own share of copies. It fails with a probability of 5% for all training
    pictures of an epoch together (Bonferroni). At risk: fewer, or pictures of others' tries alone.
    """
    confidence = 1 - (1 - CONFIDENCE) / len(training)
    # Of every epoch, (tries, noises): the family of the training picture that a copy is of; -1 of no copy.
    near = f"{measure.name}_nearest"
    families = {
        epoch: np.where(copied[epoch], training.families[np.array([row[near] for row in rows])], -1)
        for epoch, rows in by_epoch.items() if epoch != BASE
    }  # fmt: skip
    of_picture = np.array([row["training"] or "" for row in by_epoch[BASE]])
    found = []
    for i, name in enumerate(training.names):
        own, of_epoch = of_picture == name, {}
        for epoch, of in families.items():
            hits = of == training.families[i]
            mine, others = hits[own], int(hits[~own].sum())
            seen = [(hit.sum(), row["id"]) for hit, row in zip(hits, by_epoch[epoch], strict=True) if hit[row["shown"]]]
            enough = lower_end(int(mine.sum()), mine.size, confidence) > floor
            of_epoch[epoch] = {
                "copies": int(mine.sum()), "pictures": mine.size, "from_others": others,
                "verdict": VERDICTS[0] if enough else VERDICTS[1] if mine.any() or others else VERDICTS[2],
                "shown": max(seen)[1] if seen else None,
            }  # fmt: skip
        first = next((epoch for epoch, one in of_epoch.items() if one["verdict"] == VERDICTS[0]), None)
        found.append({"training": name, "caption": training.captions[i], "family": int(training.families[i]),
                      "copied_from": first, "epochs": of_epoch})  # fmt: skip
    return found


def _mark_risk(
    pictures: list[dict], by_epoch: Mapping[str, Sequence[Mapping]], signal: str, training: Training
) -> Limit:  # fmt: skip
    """Call those at risk whose signal is as high as that of pictures seen to be copied; says from where on."""
    for epoch, rows in by_epoch.items():
        values = {row["training"]: float(np.mean(row[signal])) for row in rows if signal in row}
        for picture in pictures if epoch != BASE else ():
            picture["epochs"][epoch][signal] = float(f"{values[picture['training']]:.6g}")
    entries = [one for picture in pictures for one in picture["epochs"].values()]
    seen = [one[signal] for one in entries if one["verdict"] == VERDICTS[0]]
    title = f"a picture at risk: {signal} of at least"
    if not seen:
        return Limit(title, None, "no picture was seen to be copied, so there is nothing to take a limit from")
    limit = float(f"{np.median(seen):.6g}")
    for one in entries:
        if one["verdict"] == VERDICTS[2] and one[signal] >= limit:
            one["verdict"] = VERDICTS[1]
    return Limit(title, limit, f"the median of the {len(seen)} pictures and epochs that were seen to be copied")
