"""The report of an audit."""

from __future__ import annotations

from pathlib import Path

from memorization.audit.engine import picture_file
from memorization.errors import InputError
from memorization.io.files import read_json
from memorization.report.common import interval, is_audit, made_by
from memorization.report.page import Curve, Page, Point, Shown, Table

EVIDENCE = (
    "A picture that was not seen to be copied may still be copied under other prompts, noises or settings.",
    "Intervals speak of new noises for the same prompts, not of prompts that were not tried.",
    "The limit of a copy was taken from this base and this training set; values of other audits mean something else.",
    "Nearness does not say who may use a picture; a copy here is a statement about pictures, not about rights.",
    "The recommended epoch was chosen on the same pictures that its share was counted on; audit it again with another "
    "seed before relying on its number.",
)


def fits(folder: Path, record: dict) -> bool:
    """Whether the folder holds an audit."""
    return is_audit(record)


def findings_of(folder: Path, record: dict, shown: Shown) -> dict:
    """``audit.json``; where names are left out, epochs are called by their number and the hash of what they hold."""
    found = read_json(folder / "audit.json")
    if not shown.hashed:
        return found
    names = {one["name"]: f"{number} ({shown.text(one['revision'])})" for number, one in enumerate(record["epochs"], 1)}
    for one in found["epochs"]:
        one["name"] = names.get(one["name"], one["name"])  # the base stays
    for picture in found["pictures"]:
        picture["epochs"] = {names[name]: one for name, one in picture["epochs"].items()}
        picture["copied_from"] = names.get(picture["copied_from"])
    return {**found, "recommended": names.get(found["recommended"])}


def page(folder: Path, record: dict, shown: Shown) -> Page:
    """The report of the audit in ``folder``."""
    found = findings_of(folder, record, shown)
    epochs = found["epochs"][1:]
    if not epochs:
        raise InputError(f"{folder}: no epoch is complete yet; the same command goes on with the audit")
    files = {one["name"]: one for one in record["training"]}
    hashes = {name: one["sha256"] for name, one in files.items()}
    last = epochs[-1]["name"]
    return Page(
        title=f"Audit of a fine-tune of {shown.text(record['settings']['model'])}",
        summary=summary(found, last),
        curves=[curve(found)],
        pairs=copies(folder, found, files, shown),
        pairs_title="Copies: training picture, and what was generated",
        tables=[epochs_table(found), pictures_table(found, last, hashes, shown)],
        method=[
            *limits(found),
            *known(found, hashes, shown),
            ("Training set", record["settings"]["training"]),
            adapters(found, record),
            *made_by(record, shown),
        ],
        evidence=EVIDENCE,
    )


def summary(found: dict, last: str) -> list[str]:
    """What was found, in words."""
    pictures, base = found["pictures"], found["epochs"][0]["copies"]["caption"]
    share = found["epochs"][-1]["copies"]["caption"]
    verdicts = [picture["epochs"][last]["verdict"] for picture in pictures]
    first = [picture["copied_from"] for picture in pictures if picture["copied_from"]]
    order = [one["name"] for one in found["epochs"]]
    said = [
        f"At the last epoch ({last}), of {len(pictures)} training pictures: copied {verdicts.count('copied')}, at risk "
        f"{verdicts.count('at risk')}, not seen to be copied {verdicts.count('not seen to be copied')}.",
        f"Of {share['pictures']} pictures generated from the training captions, {share['copies']} are copies: a share "
        f"of {interval(share)} (95% interval). The base model, asked the same with the same noise, gives "
        f"{base['copies']} of {base['pictures']}.",
    ]
    if first:
        said.append(f"The first epoch at which a training picture counts as copied is {min(first, key=order.index)}; "
                    "single copies, which may be chance, count as a risk alone.")  # fmt: skip
    if found["recommended"]:
        said.append(f"Recommended epoch: {found['recommended']}, the last that is not seen to copy: no picture counts "
                    "as copied, and the share of copies is not above what the base may reach.")  # fmt: skip
    else:
        said.append("No epoch can be recommended: every one is seen to copy.")
    return said


def curve(found: dict) -> Curve:
    """Share of copies by epoch, with the base's as the floor."""
    shares = [(one["name"], one["copies"]["caption"]) for one in found["epochs"]]
    points = [Point(name, share["share"], share["low"], share["high"]) for name, share in shares[1:]]
    return Curve("Share of copies by epoch", points, shares[0][1]["share"], "the base's own share")


def copies(folder: Path, found: dict, files: dict, shown: Shown) -> list:
    """Each training picture that comes back, beside what was generated, at the last epoch where it does."""
    pairs = []
    for picture in found["pictures"]:
        seen = [(name, one) for name, one in picture["epochs"].items() if one["shown"] is not None]
        if not seen:
            continue
        name, one = seen[-1]
        pairs.append(shown.pair(
            [(Path(files[picture["training"]]["file"]), f"training picture {picture['training']}"),
             (picture_file(folder, one["shown"]), f"generated at epoch {name}")],
            f"{picture['training']}: “{picture['caption']}”. {one['verdict']} at epoch {name}: {one['copies']} of "
            f"{one['pictures']} pictures of its own prompts, {one['from_others']} of others.",
        ))  # fmt: skip
    return [pair for pair in pairs if pair is not None]


def epochs_table(found: dict) -> Table:
    """A row an epoch."""
    kinds = [kind for kind in found["epochs"][0]["copies"] if kind != "all"]
    aligned = found["epochs"][0]["alignment"] is not None  # there was a CLIP
    rows = [
        [one["name"], *(interval(one["copies"][kind]) for kind in kinds),
         *([f"{one['alignment']:.3f}"] if aligned else []),
         "recommended" if one["name"] == found["recommended"] else ""]
        for one in found["epochs"]
    ]  # fmt: skip
    columns = ["epoch", *(f"copies, {kind} [95%]" for kind in kinds), *(["text alignment"] if aligned else []), "note"]
    return Table("Epochs", columns, rows)


def pictures_table(found: dict, last: str, hashes: dict, shown: Shown) -> Table:
    """A row a training picture, at the last epoch."""
    rows = []
    for picture in found["pictures"]:
        one = picture["epochs"][last]
        rows.append([
            shown.file(picture["training"], hashes[picture["training"]]), shown.text(picture["caption"]),
            one["verdict"], picture["copied_from"] or "", f"{one['copies']} of {one['pictures']}", one["from_others"],
            f"{one[found['signal']]:.4g}",
        ])  # fmt: skip
    columns = ["training picture", "caption", "verdict", "first copied at epoch", "copies, own prompts",
               "copies, other prompts", found["signal"]]  # fmt: skip
    return Table(f"Training pictures at epoch {last}", columns, rows)


def limits(found: dict) -> list[tuple[str, str]]:
    """Every limit, and where it comes from."""
    return [
        (f"Limit: {one['decides']} {number}", one["source"])
        for one in found["limits"]
        for number in ["(none)" if one["value"] is None else f"{one['value']:.4g}"]
    ]


def known(found: dict, hashes: dict, shown: Shown) -> list[tuple[str, str]]:
    """Training pictures that the base draws itself, with their limits."""
    return [
        (f"Limit of a copy of {', '.join(shown.file(name, hashes[name]) for name in one['training'])}: "
         f"{one['limit']:.4g}", f"the base's own pictures of it: it draws it itself ({one['drawn']} times)")
        for one in found["known"]
    ]  # fmt: skip


def adapters(found: dict, record: dict) -> tuple[str, str]:
    """The epochs by their hashes."""
    names = [one["name"] for one in found["epochs"][1:]]
    revisions = [one["revision"] for one in record["epochs"]]
    return "Epochs", "; ".join(f"{name} {revision}" for name, revision in zip(names, revisions, strict=True))
