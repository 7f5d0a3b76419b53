"""Can a list of prompts tell detectors apart? ``python -m memorization.studies.benchmark_audit``

Audits labelled lists without running any model: how well the text alone separates the classes, how many positives are
independent, what kinds of memorization they hold, how many are cut off at 77 tokens, and what the lists share.

  python -m memorization.studies.benchmark_audit                           the field's lists (fetch them first)
  python -m memorization.studies.benchmark_audit --prompts labelled.csv    your own list
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm import tqdm

from memorization.errors import InputError
from memorization.evaluation.metrics import family_weights, measure
from memorization.evaluation.text_baselines import capitals, naive_bayes
from memorization.flags import ArgumentParser, Arguments, add_flags, run_script
from memorization.io.files import write_atomically
from memorization.io.prompts import read_pair, read_prompts, with_families
from memorization.io.tables import markdown
from memorization.paths import ROOT

PUBLISHED = {  # benchmark: (memorized, not memorized)
    "SD 1.4, usual": ("sd1_mem.txt", "sd1_nmem.txt"),
    "SD 1.4, LAION negatives": ("memorized_laion_prompts.csv", "unmemorized_laion_prompts.csv"),
    "SD 2.0, usual": ("sd2_mem.jsonl", "sd1_nmem.txt"),
    "SD 2.0, LAION negatives": ("sd2_mem.jsonl", "unmemorized_laion_prompts.csv"),
    "RV 5.1, usual": ("RV_mem.txt", "RV_nmem.txt"),
}
KINDS = {"VM": "verbatim", "MV": "verbatim", "TM": "template", "TV": "template"}


def effective_number(families: np.ndarray) -> float:
    """How many independent prompts a list is worth: n^2 / sum of squared family sizes (Kish)."""
    _, sizes = np.unique(families, return_counts=True)
    return float(sizes.sum() ** 2 / (sizes**2).sum())


def text_rows(frame: pd.DataFrame, resamples: int) -> dict[str, str]:
    """AUC and TPR@1%FPR of the two text-only baselines, with 95% intervals over families, as text."""
    prompts, labels, families = frame["prompt"].tolist(), frame["label"].to_numpy(), frame["family"].to_numpy()
    weights = family_weights(families, labels, resamples)
    cells = {}
    for name, scores in {
        "capitals": capitals(prompts),
        "naive Bayes": naive_bayes(prompts, labels, families),
    }.items():
        metrics = measure(labels, scores, weights)
        for key, title in (("auc", "AUC"), ("tpr@1%", "TPR@1%")):
            value, low, high = metrics.values[key]
            cells[f"{name} {title}"] = f"{value:.3f} [{low:.3f}, {high:.3f}]"
    return cells


def audit(name: str, frame: pd.DataFrame, resamples: int) -> dict:
    """One row of the audit's first table."""
    positives = frame[frame["label"] == 1]
    _, sizes = np.unique(positives["family"], return_counts=True)
    return {
        "benchmark": name,
        "positives": len(positives),
        "negatives": len(frame) - len(positives),
        "families of positives": len(sizes),
        "largest": int(sizes.max()),
        "effective positives": round(effective_number(positives["family"].to_numpy()), 1),
        **text_rows(frame, resamples),
    }


def by_kind(name: str, frame: pd.DataFrame) -> list[dict]:
    """How many positives of each kind of memorization there are, and what capitals alone reach on each."""
    rows, negatives = [], frame[frame["label"] == 0]
    for kind, group in frame[frame["label"] == 1].groupby("kind"):
        both = pd.concat([group, negatives])
        labels = both["label"].to_numpy()
        metrics = measure(labels, capitals(both["prompt"].tolist()), np.ones((1, len(both))))
        rows.append({"benchmark": name, "kind": KINDS.get(kind, kind), "positives": len(group),
                     "effective": round(effective_number(group["family"].to_numpy()), 1),
                     "capitals AUC": round(metrics.values["auc"][0], 3)})  # fmt: skip
    return rows


def plain(prompt: str) -> str:
    """A prompt without CSV quoting, case and spacing, to find it again in another list."""
    if len(prompt) > 1 and prompt[0] == prompt[-1] == '"':
        prompt = prompt[1:-1].replace('""', '"')
    return " ".join(prompt.casefold().split())


def list_rows(lists: dict[str, list[str]], tokenizer) -> pd.DataFrame:
    """A row a list: prompts, repeats within it, prompts over the token limit, and what it shares with each list."""
    sets = {name: {plain(prompt) for prompt in prompts} for name, prompts in lists.items()}
    rows = []
    for name, prompts in lists.items():
        row = {"list": name, "prompts": len(prompts), "repeats": len(prompts) - len(sets[name])}
        if tokenizer:
            lengths = [len(ids) for ids in tokenizer(prompts, truncation=False, verbose=False).input_ids]
            row[f"over {tokenizer.model_max_length} tokens"] = sum(n > tokenizer.model_max_length for n in lengths)
        shared = {other: len(sets[name] & sets[other]) for other in sets if other != name}
        row["shares"] = ", ".join(f"{count} with {other}" for other, count in shared.items() if count) or "-"
        rows.append(row)
    return pd.DataFrame(rows)


def load_tokenizer(source: str | None):
    """A CLIP tokenizer from a folder or hub id; ``None`` without one."""
    if source is None:
        return None
    from transformers import CLIPTokenizer

    for folder in ("tokenizer", ""):
        try:
            return CLIPTokenizer.from_pretrained(source, model_max_length=77, subfolder=folder)
        except (OSError, ValueError, TypeError):
            continue
    raise InputError(f"{source}: no CLIP tokenizer there; give a checkpoint's folder or hub id, or leave it out")


def read_benchmarks(args) -> tuple[dict[str, pd.DataFrame], dict[str, list[str]]]:
    """(labelled lists with families, plain lists)."""
    if args.prompts:
        frame = read_prompts(args.prompts)
        if "label" not in frame or frame["label"].nunique() < 2:
            raise InputError(f"{args.prompts}: needs a column 'label' that holds both 0 and 1")
        frames, lists = {args.prompts.stem: frame}, {args.prompts.name: frame["prompt"].tolist()}
    else:
        names = sorted({name for pair in PUBLISHED.values() for name in pair})
        if missing := [name for name in names if not (args.lists / name).is_file()]:
            raise InputError(
                f"{args.lists / missing[0]}: not there; python -m memorization.prompts fetch gets the lists"
            )
        frames = {}
        for title, (memorized, non_memorized) in PUBLISHED.items():
            frames[title] = read_pair(args.lists / memorized, args.lists / non_memorized)
            kinds = read_prompts(args.lists / memorized)
            if "kind" in kinds:
                frames[title]["kind"] = kinds["kind"].reindex(range(len(frames[title]))).to_numpy()
        lists = {name: read_prompts(args.lists / name)["prompt"].tolist() for name in names}
    return {title: with_families(frame) for title, frame in frames.items()}, lists


def main(arguments: Arguments = None) -> None:
    parser = ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--prompts", type=Path, metavar="FILE", help="audit this labelled list instead of the field's")
    add("--lists", type=Path, default=ROOT / "prompts" / "published", help="default: prompts/published")
    add("--tokenizer", metavar="FOLDER|HUB_ID", help="of CLIP, to count prompts over 77 tokens (default: not counted)")
    add_flags(parser, "--resamples")
    add_flags(parser, "--out", default=Path("results/studies/benchmark_audit"), help="default: %(default)s")
    args = parser.parse_args(arguments)
    tokenizer = load_tokenizer(args.tokenizer)
    frames, lists = read_benchmarks(args)
    first = [audit(name, frame, args.resamples) for name, frame in tqdm(frames.items(), desc="audit", unit="list")]
    kinds = [row for name, frame in frames.items() if "kind" in frame for row in by_kind(name, frame)]
    tables = {"separation": pd.DataFrame(first), "kinds": pd.DataFrame(kinds), "lists": list_rows(lists, tokenizer)}
    args.out.mkdir(parents=True, exist_ok=True)
    for name, frame in tables.items():
        if not frame.empty:
            print(f"\n{markdown(frame)}")
            write_atomically(args.out / f"{name}.csv", frame.to_csv(index=False))
    print(f"\n{args.out}/*.csv", file=sys.stderr)


if __name__ == "__main__":
    run_script(main)
