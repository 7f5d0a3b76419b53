"""What a comparison of mitigations says: a table, a trade-off curve and a contact sheet.

The table and the curve follow from the folder alone (``scores.jsonl`` and ``run.json``): no model is needed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from memorization.errors import InputError
from memorization.evaluation.metrics import family_weights
from memorization.io.figures import draw_strips, save_figure
from memorization.io.files import read_lines, write_atomically
from memorization.io.records import read_record
from memorization.io.tables import markdown
from memorization.similarity.judge import FIELD_LIMITS, NEARNESS, Judge, copies_title, is_copy, is_distance
from memorization.studies.compare import PLAIN, Comparison, Item

SHOWN = (10, 4)  # columns of the sheet: copies, and items that need no mitigation


def read_comparison(folder: Path) -> tuple[pd.DataFrame, dict]:
    """(lines of the rows that are whole, what ``run.json`` says of the run)."""
    lines = pd.DataFrame(read_lines(folder / "scores.jsonl")[0])
    if not {"row", "item", "label", "family"} <= set(lines) or not (lines["row"] == PLAIN).any():
        raise InputError(f"{folder}: scores.jsonl holds no comparison with a row {PLAIN!r}")
    items = lines.groupby("row")["item"].transform("size")
    return lines[items == items[lines["row"] == PLAIN].iloc[0]], read_record(folder / "run.json")


def table_of_run(folder: Path, resamples: int = 1000) -> pd.DataFrame:
    """The table of a comparison, a row a row, plain sampling first."""
    lines, run = read_comparison(folder)
    frechet = {name: row["frechet"] for name, row in run["rows"].items() if "frechet" in row}
    return table_of(lines, run["copy_limits"], resamples, frechet)


def table_of(
    lines: pd.DataFrame, limits: Mapping[str, float], resamples: int, frechet: Mapping[str, float] | None = None
) -> pd.DataFrame:
    """A row a row of the comparison.

    Args:
        lines: of whole rows.
        limits: measure of nearness -> the value at which copies are counted.
        resamples: of families, for the 95% intervals (``low``, ``high``).
        frechet: distance by row.

    Returns:
        ``copies`` by the first of the limits that was measured, and all else of items with label 1, but for the columns
        that begin with ``ordinary``, of the others; ``seconds`` for the remedy, an item; ``copies attacked`` where the
        row was attacked, too.
    """
    plain, found = lines[lines["row"] == PLAIN], []
    attacked = lines[lines["base"].notna()] if "base" in lines else lines[:0]
    for name in lines["row"][~lines["row"].isin(attacked["row"])].unique():
        own = lines[lines["row"] == name]
        memorized, ordinary = (own[own["label"] == label] for label in (1, 0))
        measured = measures_of(memorized)
        row = {"row": name, "method": own["method"].iloc[0], "strength": own["strength"].iloc[0]}
        row |= _with_intervals(measured, limits, family_weights(memorized["family"].to_numpy(), None, resamples))
        row |= _nearest(measured)
        if frechet and name in frechet:
            row["Frechet"] = frechet[name]
        row |= {name: measured[name].mean() for name in measured if name not in (*NEARNESS, "clip")}
        after = attacked[attacked["base"] == name] if len(attacked) else attacked
        found.append(row | _attacked(after, limits, resamples) | _ordinary(ordinary, plain[plain["label"] == 0])
                     | _effort(memorized))  # fmt: skip
    return pd.DataFrame(found).dropna(axis=1, how="all")


def measures_of(lines: pd.DataFrame) -> dict[str, np.ndarray]:
    """The judge's values by measure, ``(items, noises)``: nearness first, only those that all lines have."""
    names = [name for name in lines if len(lines) and lines[name].map(lambda value: isinstance(value, list)).all()]
    ordered = [*(name for name in NEARNESS if name in names), *(name for name in names if name not in NEARNESS)]
    return {str(name): np.array(lines[name].tolist(), dtype=float) for name in ordered}


def _with_intervals(
    measured: Mapping[str, np.ndarray], limits: Mapping[str, float], weights: np.ndarray
) -> dict[str, float]:
    """Shares of copies, and the CLIP score, which pays for fewer of them."""
    columns = {}
    for name in (name for name in limits if name in measured):
        columns[f"copies by {name}" if columns else "copies"] = is_copy(name, measured[name], limits[name])
    if "clip" in measured:
        columns["clip"] = measured["clip"]
    row = {}
    for name, values in columns.items():
        row[name], row[f"{name} low"], row[f"{name} high"] = resampled_mean(values.mean(1), weights)
    return row


def _attacked(lines: pd.DataFrame, limits: Mapping[str, float], resamples: int) -> dict[str, float]:
    """Copies after an attack on the embeddings, as ``copies``; of memorized items, and of the others as a control."""
    if lines.empty:
        return {}
    memorized, ordinary = (lines[lines["label"] == label] for label in (1, 0))
    weights = family_weights(memorized["family"].to_numpy(), None, resamples)
    found = _with_intervals(measures_of(memorized), limits, weights)
    row = {key.replace("copies", "copies attacked"): value for key, value in found.items() if key.startswith("copies")}
    measured = measures_of(ordinary)
    for name in [name for name in limits if name in measured][:1]:
        row["ordinary: copies attacked"] = is_copy(name, measured[name], limits[name]).mean()
    return row


def _nearest(measured: Mapping[str, np.ndarray]) -> dict[str, float]:
    """By each measure of nearness: shares beyond the field's limits, the nearest 5%, the nearest."""
    row = {}
    for name in (name for name in NEARNESS if name in measured):
        values, low = measured[name], is_distance(name)
        for limit in FIELD_LIMITS.get(name, ()):
            row[copies_title(name, limit)] = is_copy(name, values, limit).mean()
        row[f"{name} 5%" if low else f"{name} top 5%"] = np.quantile(values, 0.05 if low else 0.95)
        row[f"{name} lowest" if low else f"{name} highest"] = values.min() if low else values.max()
    return row


def _ordinary(lines: pd.DataFrame, plain: pd.DataFrame) -> dict[str, float]:
    """What a row does to items that need no mitigation, against plain sampling."""
    if lines.empty:
        return {}
    row, before = {}, measures_of(plain)
    for name, values in measures_of(lines).items():
        if name not in NEARNESS:
            row[f"ordinary: {name}"] = values.mean()
            row[f"ordinary: {name} change"] = (values - before[name]).mean()
    return row | {"ordinary: picture change": lines["moved"].mean()}


def _effort(lines: pd.DataFrame) -> dict[str, float]:
    """Mean score, median seconds an item."""
    row = {"score": lines["score"].mean()} if "score" in lines else {}
    names = {"seconds": "seconds", "seconds to generate": "seconds_generation"}
    return row | {name: lines[key].median() for name, key in names.items() if key in lines}


def resampled_mean(values: np.ndarray, weights: np.ndarray) -> tuple[float, float, float]:
    """Mean of ``values (rows,)`` and its 95% interval by bootstrap ``weights (b, rows)``."""
    low, high = np.percentile(weights @ values / weights.sum(1), [2.5, 97.5])
    return float(values.mean()), float(low), float(high)


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
        found.append({"method": method, column: min(reached, default=np.nan)})
    return pd.DataFrame(found).sort_values(column)


def draw_curve(table: pd.DataFrame, path: Path, title: str) -> Path:
    """Share of copies against text alignment, a line a method; the best corner is below, on the right."""
    figure, axis = plt.subplots(figsize=(8, 5.4))
    none = table.iloc[0]
    axis.plot(none["clip"], none["copies"], "k*", markersize=14, label="no mitigation")
    for i, (method, group) in enumerate(table.iloc[1:].groupby("method", sort=False)):
        bars = np.abs(group[["copies low", "copies high"]].to_numpy().T - group["copies"].to_numpy())
        style = "os^DvP*X<>hd"[i % 12] + ("-" if i < 10 else "--")
        axis.errorbar(group["clip"], group["copies"], yerr=bars, fmt=style, color=f"C{i % 10}", markersize=5,
                      elinewidth=0.5, label=method)  # fmt: skip
    axis.set(xlabel="text alignment (CLIP score)", ylabel="share of pictures that are copies", title=title)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    return save_figure(figure, path)


def shown_pictures(plain: pd.DataFrame) -> list[tuple[int, int]]:
    """(item, noise) of each column of a sheet: the copies of plain sampling that are nearest, then ordinary items."""
    memorized, ordinary = (plain[plain["label"] == label] for label in (1, 0))
    measured, found = measures_of(memorized), []
    if measure := next((name for name in NEARNESS if name in measured), None):
        distance = measured[measure] * (1 if is_distance(measure) else -1)
        order, items = distance.min(1).argsort(kind="stable")[: SHOWN[0]], memorized["item"].to_numpy()
        found = [(int(items[i]), int(distance[i].argmin())) for i in order]
    return found + [(int(item), 0) for item in ordinary["item"].head(SHOWN[1])]


def draw_sheet(comparison: Comparison, rows: Sequence[str], items: Sequence[Item], judge: Judge, path: Path) -> Path:
    """The training picture that plain sampling is measured against, above the pictures of ``rows`` that are whole."""
    rows = [row for row in rows if len(comparison.lines(row)) == len(items)]
    columns = shown_pictures(pd.DataFrame(comparison.lines(PLAIN)))
    strips = {row: [comparison.pictures(row, item)[noise] for item, noise in columns] for row in (PLAIN, *rows)}
    training = [judge.training_picture(picture, items[item].image)
                for picture, (item, _) in zip(strips[PLAIN], columns, strict=True)]  # fmt: skip
    return draw_strips({"training picture, the nearest where none is its own": training, **strips}, path)


def print_table(table: pd.DataFrame) -> None:
    """To standard output, without columns that say nothing of these rows."""
    print(markdown(table.dropna(axis=1, how="all").round(3).astype(object).fillna("")) + "\n")


def write_report(folder: Path, resamples: int, title: str) -> pd.DataFrame:
    """Write ``table.csv`` and, where there is a text to agree with, ``tradeoff.png``; gives back the table."""
    table = table_of_run(folder, resamples)
    write_atomically(folder / "table.csv", table.round(4).to_csv(index=False))
    if "clip" in table:
        draw_curve(table, folder / "tradeoff.png", title)
    return table
