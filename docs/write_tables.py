#!/usr/bin/env python
"""Fill the tables of the documents from the files under results/: ``python docs/write_tables.py``

A table stands between ``<!-- table: NAME ARGUMENTS -->`` and ``<!-- end -->``, and is written by the function of that
name below. ``--check`` writes nothing and ends with status 1 where a table is not what the files say.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pandas as pd

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.figures import BARE, NETWORKS, PLAIN, TOOL, score_rows, speed_rows  # noqa: E402

RESULTS = ROOT / "results"
PLACE = re.compile(r"(<!-- table: (.+?) -->\n).*?(<!-- end -->)", re.DOTALL)
TABLES: dict[str, Callable[..., str]] = {}
MODELS = {"testbed-eps": "eps", "testbed-v": "v"}


def table(function: Callable[..., str]) -> Callable[..., str]:
    """Make a function a table of its name."""
    TABLES[function.__name__] = function
    return function


# ---------------------------------------------------------------- numbers as text
def number(value: float, digits: int = 3) -> str:
    """``.949``, ``1.36``, ``-.02``; empty where there is none."""
    if value is None or pd.isna(value):
        return ""
    text = re.sub(r"^(-?)0(?=\.)", r"\1", f"{value:.{digits}f}")
    return text.removeprefix("-") if float(text) == 0 else text


def signed(value: float, digits: int = 2) -> str:
    text = number(value, digits)
    return f"+{text}" if float(text or 0) > 0 else text


def interval(cell: dict, digits: int = 3) -> str:
    return f"{number(cell['value'], digits)} [{number(cell['low'], digits)}, {number(cell['high'], digits)}]"


def rows_as_table(rows: list[dict]) -> str:
    """Rows that share their columns; a word where there are none."""
    if not rows:
        return "(not run yet)\n"
    columns = list(rows[0])
    lines = [
        [column.strip() for column in columns],
        ["---"] * len(columns),
        *([str(row[column]) for column in columns] for row in rows),
    ]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines).replace("|  |", "| |")


# ---------------------------------------------------------------- detection
def metrics_of(model: str, run: str) -> dict:
    """What ``detect_eval.py`` wrote of a run; nothing where there is none."""
    path = RESULTS / "detection" / model / run / "metrics.json"
    return (
        json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"detectors": [], "paired": [], "costs": {}}
    )


def found(metrics: dict, detector: str, images: int | None) -> dict | None:
    """The line of a detector at a number of noises."""
    lines = (line for line in metrics["detectors"] if (line["detector"], line["images"]) == (detector, images))
    return next(lines, None)


def measured(line: dict) -> dict[str, str]:
    """AUC and TPR with intervals, and the FPR that was reached."""
    reached = line["realised_fpr"]
    return {
        "AUC": interval(line["auc"]),
        **{f"TPR@{t}%FPR": f"{interval(line[key])} at {reached[key]:.2%}" for t, key in ((1, "tpr@1%"), (3, "tpr@3%"))},
    }


@table
def first_screen() -> str:
    """Two detectors on both shipped models, with as many noises as were drawn."""
    rows = []
    for model in MODELS:
        metrics = metrics_of(model, "main")
        counts = metrics["counts"]
        size = f"{counts['memorized']} / {counts['not_memorized']}"
        n = max(line["images"] or 0 for line in metrics["detectors"])
        for detector in ("anisotropy", "noise_norm"):
            line = found(metrics, detector, n)
            values = {"n": n, "AUC": interval(line["auc"]), "TPR@1%FPR": interval(line["tpr@1%"])}
            rows.append({"model": model, "memorized / not": size, "detector": detector, **values})
    return rows_as_table(rows)


@table
def detection(model: str) -> str:
    """The table that ``detect_eval.py`` prints of a run."""
    metrics = metrics_of(model, "main")
    counts = metrics["counts"]
    head = (f"`{model}`: {counts['memorized']} memorized prompts, {counts['not_memorized']} not memorized, "
            f"{counts['families']} families\n\n")  # fmt: skip
    return head + rows_as_table([
        {"detector": line["detector"], "n": line["images"] or "-", **measured(line)} for line in metrics["detectors"]
    ])  # fmt: skip


@table
def paired(run: str, images: str) -> str:
    """AUC of every detector of the runs of this name, less that of the norm, on the same resamples."""
    against = {
        model: {line["detector"]: line for line in metrics_of(model, run)["paired"]
                if (line["metric"], line["images"]) == ("auc", int(images))}
        for model in MODELS
    }  # fmt: skip
    rows = []
    for name in dict.fromkeys(name for lines in against.values() for name in lines):
        row = {"detector": name}
        for model, lines in against.items():
            cells = ("the same" if lines else "-", "")
            if line := lines.get(name):
                value, low, high = (signed(line[key], 3) for key in ("difference", "low", "high"))
                cells = (f"{value} [{low}, {high}]", number(line["p"]))
            short = MODELS[model]
            row |= dict(zip((f"{short}: AUC less the norm's", f"{short}: p"), cells, strict=True))
        rows.append(row)
    return rows_as_table(rows)


@table
def league() -> str:
    """Every detector on both models: n = 1 from the runs ``all``, n = 4 from the runs ``trace``; best on eps first."""
    runs = {model: (metrics_of(model, "all"), metrics_of(model, "trace")) for model in MODELS}
    every = runs["testbed-eps"][0]
    order = sorted(every["detectors"], key=lambda line: -line["auc"]["value"])
    rows = []
    for name, images in ((line["detector"], line["images"]) for line in order):
        for n, run in ((images, 0), (4, 1)):
            lines = {model: found(runs[model][run], name, n) for model in MODELS}
            if any(lines.values()):
                rows.append(_league_row(name, n, every["costs"].get(name), lines))
    if rows and "all" in every["costs"]:
        rows.append(dict.fromkeys(rows[0], "-") | _league_row("all of them together", 1, every["costs"]["all"], {}))
    return rows_as_table(rows)


def _league_row(name: str, n: int | None, cost: dict | None, lines: dict[str, dict]) -> dict:
    paid = {"needs": "-", "UNet": "-", "s/prompt": "-"}
    if cost:
        units, seconds = cost["evaluations"] * n, cost["seconds"] * n
        paid = {"needs": cost["needs"], "UNet": f"{units:g}", "s/prompt": f"{seconds:.2g}"}
    row = {"detector": name, **paid, "n": n or "-"}
    for model, line in lines.items():
        for title, key in (("AUC", "auc"), ("TPR@1%", "tpr@1%"), ("TPR@3%", "tpr@3%")):
            row[f"{MODELS[model]}: {title}"] = interval(line[key]) if line else "-"
    return row


@table
def published() -> str:
    """What papers report, beside our runs of the same models where there are any."""
    rows = []
    for line in pd.read_csv(RESULTS / "reported.csv").itertuples(index=False):
        own = found(metrics_of(line.config, "main"), line.detector, line.n)
        reported = " / ".join(number(value) or "-" for value in line[5:7])
        reproduced = own and " / ".join(number(own[key]["value"]) for key in ("auc", "tpr@1%"))
        command = line.command if line.command == "the same" else f"`{line.command}`"
        rows.append({"model": line.model, "detector": line.shown, "n": line.n, "reported": reported,
                     "reproduced": reproduced or "", "command": command})  # fmt: skip
    return rows_as_table(rows)


# ---------------------------------------------------------------- benchmarks
def study(name: str, file: str = "table.csv") -> pd.DataFrame:
    return pd.read_csv(RESULTS / "studies" / name / file)


@table
def benchmark_separation() -> str:
    """What the text alone reaches on the field's lists."""
    frame = study("benchmark_audit", "separation.csv")
    rows = []
    for line in frame.to_dict("records"):
        row = {key: line[key] for key in ("benchmark", "positives")}
        row |= {"families": line["families of positives"], "effective positives": line["effective positives"]}
        for title, key in (("share of capitals", "capitals"), ("naive Bayes, out of fold", "naive Bayes")):
            row[title] = f"{line[f'{key} AUC']} / {line[f'{key} TPR@1%']}".replace("0.", ".")
        rows.append(row)
    return rows_as_table(rows)


@table
def benchmark_lists() -> str:
    frame = study("benchmark_audit", "lists.csv").astype(str)
    return rows_as_table([{**line, "list": f"`{line['list']}`"} for line in frame.to_dict("records")])


@table
def benchmark_kinds() -> str:
    frame = study("benchmark_audit", "kinds.csv")
    return rows_as_table([
        {**line, "capitals AUC": number(line["capitals AUC"])} for line in frame.to_dict("records")
    ])  # fmt: skip


# ---------------------------------------------------------------- studies
TIMESTEPS = (981, 881, 781, 681, 481, 281, 181, 41, 1)


@table
def timesteps(model: str) -> str:
    """AUC of each feature at some timesteps."""
    frame = study("timestep_sweep", f"{model}-validation/table.csv")
    names = {"noise": "pure noise", "generation": "along a generation"}
    shown = [t for t in TIMESTEPS if t in set(frame["t"])]
    wide = frame.pivot_table(index=["latents", "feature"], columns="t", values="auc", sort=False)
    return rows_as_table([
        {"latents": names[latents], "feature": feature, **{f"t = {t}": number(line[t], 2) for t in shown}}
        for (latents, feature), line in wide.iterrows()
    ])  # fmt: skip


@table
def fusion() -> str:
    """The best pairs of features on the validation half of testbed-eps."""
    frame = study("timestep_sweep", "testbed-eps-validation/fusion.csv").head(5)
    return rows_as_table([
        {"first": line["first"], "second": line["second"], "AUC": number(line["auc"]),
         "TPR@1%FPR": number(line["tpr@1%"]), "weights": f"{line['first weight']:.3g}, {line['second weight']:.3g}"}
        for line in frame.to_dict("records")
    ])  # fmt: skip


@table
def sequential() -> str:
    """Fixed numbers of noises and the sequential mode, on both models."""
    frames = {model: pd.read_csv(RESULTS / "detection" / model / "sequential" / "sequential.csv") for model in MODELS}
    rows = []
    for place, mode in enumerate(frames["testbed-eps"]["mode"]):
        row = {"mode": mode}
        for model, frame in frames.items():
            line, short = frame.iloc[place], MODELS[model]
            cells = {key: interval({part: line[f"{key} {part}"] for part in ("value", "low", "high")}, 2)
                     for key in ("auc", "tpr@1%")}  # fmt: skip
            row |= {f"{short}: UNet": f"{line['UNet']:.3g}", f"{short}: AUC": cells["auc"],
                    f"{short}: TPR@1%FPR": cells["tpr@1%"]}  # fmt: skip
        rows.append(row)
    return rows_as_table(rows)


@table
def mixture() -> str:
    """p-Laplacian by the boundary estimator beside the closed form."""
    frame = study("gaussian_mixture")
    frame = frame[frame["estimator"] == "boundary"]
    return rows_as_table([
        {"score": line["score"], "place": line["place"], "p": f"{line['p']:g}", "estimate": number(line["value"]),
         "standard error": number(line["standard_error"]), "exact": number(line["exact"])}
        for line in frame[frame["p"].isin([1, 2])].to_dict("records")
    ])  # fmt: skip


@table
def p_laplace() -> str:
    """AUC of the p-Laplacian without a prompt, against p, noise level and number of points."""
    rows = []
    frames = {model: study("p_laplace_sweep", f"{model}-validation/auc.csv") for model in MODELS}
    frames = {model: frame[frame["prompt"] == "none"] for model, frame in frames.items()}
    for p in sorted(frames["testbed-eps"]["p"].unique()):
        for points in (4, 64):
            row = {"p": f"{p:g}", "points": points}
            for model, frame in frames.items():
                for t in sorted(frame["t"].unique()):
                    chosen = frame[(frame["p"] == p) & (frame["t"] == t) & (frame["N"] == points)]
                    row[f"{MODELS[model]}: t = {t}"] = number(chosen["auc"].item(), 2)
            rows.append(row)
    return rows_as_table(rows)


# ---------------------------------------------------------------- mitigation
@table
def mitigations(model: str) -> str:
    """Every method at its default strength; lowest share of copies at 90% of the text alignment first."""
    from memorization.mitigations.base import MITIGATIONS, make_mitigation
    from memorization.studies.compare_report import at_equal_alignment

    frame = pd.read_csv(RESULTS / "mitigation" / model / "table.csv", keep_default_na=True)
    equal = at_equal_alignment(frame)
    column = equal.columns[1]
    rows = [(_mitigation_row(frame.iloc[0], "-"), "-")]
    for name, share in equal.itertuples(index=False):
        if name in MITIGATIONS:
            strength = make_mitigation(name).strength
            line = frame[(frame["method"] == name) & (frame["strength"] == strength)].iloc[0]
            rows.append((_mitigation_row(line, f"{strength:g}"), number(share, 2)))
    return rows_as_table([{**row, column: last} for row, last in rows])


def _mitigation_row(line: pd.Series, strength: str) -> dict:
    def cell(name: str) -> str:
        return interval({"value": line[name], "low": line[f"{name} low"], "high": line[f"{name} high"]}, 2)

    plain = line["method"] == "none"
    return {
        "method": line["method"], "strength": strength, "copies": cell("copies"),
        "copies by SSCD": cell("copies by sscd"), "CLIP": cell("clip"),
        "nL2 < 1.4": number(line["nl2 < 1.4"], 2), "nL2 top 5%": number(line["nl2 5%"], 2),
        "SSCD top 5%": number(line["sscd top 5%"], 2), "SSCD top 1": number(line["sscd highest"], 2),
        "ordinary: CLIP": "-" if plain else signed(line["ordinary: clip change"]),
        "ordinary: picture": "-" if plain else number(line["ordinary: picture change"], 2),
        "remedy, s": "-" if plain else number(line["seconds"], 1),
        "generation, s": "-" if plain else number(line["seconds to generate"], 1),
    }  # fmt: skip


# ---------------------------------------------------------------- AMG
COMPARED = ("base", "ablation", "gni", "rt", "cwr", "rna", "amg main", "amg strong")
APART = (
    "spe",
    "dup",
    "sim",
    "sim+spe",
    "sim+dup",
    "spe+dup",
    "amg main",
    "constant gate",
    "no gate",
    "looks every step",
)


@table
def amg(part: str) -> str:
    """Rows of the text-conditional study: ``compared`` with other methods, or its parts ``apart``."""
    frame = pd.read_csv(RESULTS / "amg" / "testbed-eps" / "table.csv").set_index("row")
    limits = _limits("testbed-eps")
    titles = {
        "nl2 top 5%": "nL2 top 5%", "nl2 top 1": "top 1", f"nl2 < {limits['nl2']:g}": f"< {limits['nl2']:g} (copy)",
        "nl2 < 1.4": "< 1.4", "sscd top 5%": "SSCD top 5%", "sscd top 1": "top 1 ",
        f"sscd > {limits['sscd']:g}": f"> {number(limits['sscd'], 2)} (copy)", "sscd > 0.4": "> .4",
        "Frechet": "Frechet", "CLIP": "CLIP", "ordinary: CLIP": "ordinary: CLIP",
        "ordinary: moved": "moved", "s / picture": "s / picture",
    }  # fmt: skip
    rows = [name for name in {"compared": COMPARED, "apart": APART}[part] if name in frame.index]
    digits = {"Frechet": 3}
    return rows_as_table([
        {"row": name, **{title: number(frame.loc[name, key], digits.get(key, 2)) for key, title in titles.items()}}
        for name in rows
    ])  # fmt: skip


def _limits(model: str) -> dict[str, float]:
    """Below or above which a picture counts as a copy in the study's tables."""
    columns = pd.read_csv(RESULTS / "amg" / model / "table.csv", nrows=0).columns
    firsts = {}
    for column in columns:
        if match := re.fullmatch(r"(\w+) [<>] ([\d.]+)", column):
            firsts.setdefault(match[1], float(match[2]))
    return firsts


@table
def amg_pixel() -> str:
    rows = []
    for model, name in (("pixel-uncond", "unconditional"), ("pixel-class", "class-conditional")):
        for line in pd.read_csv(RESULTS / "amg" / model / "table.csv").to_dict("records"):
            row = {"model": name, "guidance": line["row"], "nL2 top 5%": number(line["nl2 top 5%"], 2),
                   "top 1": number(line["nl2 top 1"], 2), "< 1.0 (copy)": number(line["nl2 < 1"])}  # fmt: skip
            row |= {f"< {limit}": number(line[f"nl2 < {limit}"]) for limit in (1.4, 1.6)}
            row |= {"CLIP top 5%": number(line["clip top 5%"]), "Frechet": number(line["Frechet"])}
            rows.append({**row, "s / picture": number(line["s / picture"])})
    return rows_as_table(rows)


# ---------------------------------------------------------------- speed
@table
def speed(model: str) -> str:
    frame = pd.read_csv(RESULTS / "speed" / "detection.csv")
    lines = frame[frame["model"] == model].to_dict("records")
    return rows_as_table([
        {"": line["what"], "s/prompt": f"{line['seconds a prompt']:.3g}",
         "prompts/s": f"{1 / line['seconds a prompt']:.3g}",
         "times the plain loop": f"{lines[0]['seconds a prompt'] / line['seconds a prompt']:.3g}",
         "batch": "" if pd.isna(line["batch"]) else f"{line['batch']:.0f}"} for line in lines
    ])  # fmt: skip


@table
def index_search() -> str:
    frame = pd.read_csv(RESULTS / "speed" / "index.csv", dtype=str).fillna("-")
    return rows_as_table([{**line, "pictures": f"{int(line['pictures']):,}"} for line in frame.to_dict("records")])


@table
def index_build() -> str:
    return rows_as_table(pd.read_csv(RESULTS / "speed" / "index_build.csv", dtype=str).to_dict("records"))


@table
def cuda_scores() -> str:
    """Scores on every card against those of the CPU in float32."""
    columns = ("dtype", "score", "largest relative difference", "Spearman", "AUC difference")
    return rows_as_table(_of_cards(score_rows) or [{"card": "", "model": model, **_empty(columns)} for model in MODELS])


@table
def cuda_speed() -> str:
    """Speed on every card, of each way the fastest batch."""
    columns = ("dtype", "how", "batch", "ms a row", "ms a prompt", "times the plain loop", "share of the peak")
    ways = [*((NETWORKS[0], what) for what in (PLAIN, TOOL)), *((name, BARE) for name in NETWORKS)]
    empty = [{"card": "", "network": name, "what": what, **_empty(columns)} for name, what in ways]
    return rows_as_table(_of_cards(partial(speed_rows, best=True)) or empty)


def _of_cards(rows_of: Callable[[list[dict]], list[dict]]) -> list[dict]:
    """Rows of all files that benchmarks/on_cuda.sh wrote."""
    files = [json.loads(path.read_text(encoding="utf-8")) for path in sorted((RESULTS / "speed").glob("cuda-*.json"))]
    return [{"card": found["about"]["card"], **row} for found in files for row in rows_of(found["rows"])]


def _empty(columns: tuple[str, ...]) -> dict[str, str]:
    return dict.fromkeys(columns, "")


# ---------------------------------------------------------------- families
@table
def families(kind: str) -> str:
    """What works on which family, of detectors or mitigations."""
    frame = pd.read_csv(RESULTS / "families.csv", dtype=str).fillna("")
    frame = frame[frame["kind"] == kind].drop(columns="kind")
    return rows_as_table([{**row, "method": f"`{row['method']}`"} for row in frame.to_dict("records")])


# ---------------------------------------------------------------- sizes
@table
def sizes() -> str:
    """Lines of one file of each kind that one may add."""
    files = {
        "a detector": "detectors/noise_norm.py",
        "a mitigation": "mitigations/gni.py",
        "a model": "configs/sd14.yaml",
    }
    rows = []
    for what, name in files.items():
        path = ROOT / "memorization" / name
        lines = len(path.read_text(encoding="utf-8").splitlines())
        rows.append({"what": what, "file": f"[{path.name}](memorization/{name})", "lines": lines})
    return rows_as_table(rows)


# ---------------------------------------------------------------- documents
def documents() -> list[Path]:
    """Every markdown file of the project."""
    return sorted(path for pattern in ("*.md", "*/README.md", "docs/**/*.md") for path in ROOT.glob(pattern))


def filled(text: str) -> str:
    """A document with its tables as the files have them."""

    def fill(match: re.Match) -> str:
        name, *arguments = match[2].split()
        return f"{match[1]}\n{TABLES[name](*arguments)}\n{match[3]}"

    return PLACE.sub(fill, text)


def main() -> None:
    stale = []
    for path in documents():
        text = path.read_text(encoding="utf-8")
        if (new := filled(text)) != text:
            stale.append(path.relative_to(ROOT).as_posix())
            if "--check" not in sys.argv:
                path.write_text(new, encoding="utf-8")
    if stale:
        print("\n".join(stale))
    sys.exit(bool(stale) and "--check" in sys.argv)


if __name__ == "__main__":
    main()
