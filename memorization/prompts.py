"""Prompt lists: read them, and download the field's published ones.

python -m memorization.prompts fetch [--from DIR|URL] [--out prompts/published]
"""

from __future__ import annotations

import csv
import hashlib
import http.client
import io
import json
import urllib.request
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from memorization.errors import ArgumentParser, InputError, run_script

ROOT = Path(__file__).parent.parent
OPTIONAL = ("label", "family", "kind", "duplicates", "replication", "image", "split")
# How published lists name what we call prompt and kind.
ALIASES = {"caption": "prompt", "type": "kind", "overfit_type": "kind"}


def read_prompts(path: str | Path, extra: Sequence[str] = ()) -> pd.DataFrame:
    """Read a ``.txt`` (a prompt a line), ``.csv`` (``,`` or ``;``) or ``.jsonl`` list.

    Args:
        extra: further columns to keep, which the list must have.

    Returns:
        A frame with ``prompt`` (str) and those of ``OPTIONAL`` that the list has; ``label`` is 0 or 1. Blank lines of a
        ``.txt`` are skipped and counted in ``frame.attrs["blank_lines"]``; in the other formats a prompt may be empty.

    Raises:
        InputError: the file is missing, empty, not UTF-8, malformed, or has no ``prompt`` column.
    """
    path = Path(path)
    text = _read_text(path)
    readers = {".txt": _read_txt, ".csv": _read_csv, ".jsonl": _read_jsonl}
    if path.suffix not in readers:
        raise InputError(f"{path}: prompt lists are .txt, .csv or .jsonl files, not '{path.suffix}'")
    frame = readers[path.suffix](path, text)
    blank_lines = frame.attrs.get("blank_lines", 0)
    frame.columns = [str(column).lower() for column in frame.columns]
    frame = frame.rename(columns={old: new for old, new in ALIASES.items() if new not in frame})
    if "prompt" not in frame:
        raise InputError(f"{path}: no column 'prompt' (or 'caption'); it has: {', '.join(frame.columns)}")
    if missing := [column for column in extra if column not in frame]:
        raise InputError(f"{path}: no column {missing[0]!r}; it has: {', '.join(frame.columns)}")
    frame = frame[["prompt", *(c for c in OPTIONAL if c in frame), *extra]].reset_index(drop=True)
    if frame.empty:
        raise InputError(f"{path}: holds no prompt")
    if not (is_text := frame["prompt"].map(_is_text)).all():
        row = is_text.idxmin()
        raise InputError(f"{path}: the prompt in row {row + 1} is no text: {frame['prompt'][row]!r}")
    if "label" in frame:
        frame["label"] = _labels(path, frame["label"])
    if "split" in frame and not frame["split"].isin(["validation", "test"]).all():
        raise InputError(f"{path}: the column 'split' holds something other than validation and test")
    for column in {"duplicates", "replication"} & set(frame):
        frame[column] = pd.to_numeric(frame[column], errors="coerce")
    frame.attrs["blank_lines"] = blank_lines
    return frame


def read_pair(memorized: str | Path, non_memorized: str | Path) -> pd.DataFrame:
    """A labelled list from two: every prompt of the first gets label 1, of the second 0; keeps the columns of both."""
    parts = [read_prompts(memorized).assign(label=1), read_prompts(non_memorized).assign(label=0)]
    shared = [column for column in parts[0] if column in parts[1]]
    parts = [part[shared] for part in parts]
    frame = pd.concat(parts, ignore_index=True)
    frame.attrs["blank_lines"] = sum(part.attrs["blank_lines"] for part in parts)
    return frame


def near_copy_families(prompts: list[str], threshold: float = 0.5) -> list[str]:
    """Families for lists that name none: prompts that share at least half of their distinct words, and their chains.

    Two prompts are linked if the Jaccard similarity of their word sets is at least ``threshold``; families are the
    connected components.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components
    from sklearn.feature_extraction.text import CountVectorizer

    texts = [prompt if prompt.strip() else "(blank)" for prompt in prompts]
    words = CountVectorizer(binary=True, token_pattern=r"\S+", dtype=np.float32).fit_transform(texts)
    shared = (words @ words.T).tocoo()  # sparse: pairs without a common word do not appear
    size = np.asarray(words.sum(axis=1)).ravel()
    linked = shared.data >= threshold * (size[shared.row] + size[shared.col] - shared.data)
    graph = coo_array((linked[linked], (shared.row[linked], shared.col[linked])), shape=shared.shape)
    _, family = connected_components(graph, directed=False)
    return [f"f{index}" for index in family]


def _read_text(path: Path) -> str:
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: byte {error.start} is not UTF-8; convert the file to UTF-8") from None
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    if not text.strip():
        raise InputError(f"{path}: the file is empty")
    return text


def _read_txt(path: Path, text: str) -> pd.DataFrame:
    lines = [line.strip() for line in text.removesuffix("\n").split("\n")]  # not splitlines: prompts may hold U+2028
    frame = pd.DataFrame({"prompt": [line for line in lines if line]})
    frame.attrs["blank_lines"] = len(lines) - len(frame)
    return frame


def _read_csv(path: Path, text: str) -> pd.DataFrame:
    header = text.split("\n", 1)[0]
    separator = ";" if header.count(";") > header.count(",") else ","
    try:
        names, *rows = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    except csv.Error as error:
        raise InputError(f"{path}: malformed CSV: {error}") from None
    rows = [row for row in rows if row]
    if ragged := [number for number, row in enumerate(rows, 1) if len(row) != len(names)]:
        count = len(rows[ragged[0] - 1])
        raise InputError(
            f"{path}: malformed CSV: row {ragged[0]} has {count} cells, the header {len(names)}; quote commas"
        )
    return pd.DataFrame(rows, columns=names)


def _read_jsonl(path: Path, text: str) -> pd.DataFrame:
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict):
            raise InputError(f"{path}, line {number}: not a JSON object")
        rows.append(row)
    return pd.DataFrame(rows)


def _is_text(prompt: object) -> bool:
    return isinstance(prompt, str) and not any("\ud800" <= letter <= "\udfff" for letter in prompt)


def _labels(path: Path, labels: pd.Series) -> pd.Series:
    numbers = pd.to_numeric(labels, errors="coerce")
    wrong = ~numbers.isin([0, 1])
    if wrong.any():
        raise InputError(f"{path}: label {labels[wrong].iloc[0]!r} in row {wrong.idxmax() + 1} is not 0 or 1")
    return numbers.astype(int)


# ---------------------------------------------------------------- the published lists
_ANISOTROPY = "rohanasthana/memorization-anisotropy/97e991bac4171ad0547c5779c31180ea8e9f672e"
_LOCALIZING = "ml-research/localizing_memorization_in_diffusion_models/f952eded64fca0bcf42e0bb3be9a01d64653cfdb"
RAW = "https://raw.githubusercontent.com"
PUBLISHED = {  # name: (repository and commit, sha256)
    "sd1_mem.txt": (_ANISOTROPY, "6f11239c621a7846979170c79d79f86a31441e044a7bc0b5d952ba8a5ca0fb56"),
    "sd1_mem.jsonl": (_ANISOTROPY, "b882b7d82b3fb603769beced712c327e47f7899dfa7c483e0183ec133c221580"),
    "sd1_nmem.txt": (_ANISOTROPY, "628796e195391501591859f55e249cca70e8fcaa7ceb33aac1d753fbfe4d8a4c"),
    "sd2_mem.txt": (_ANISOTROPY, "02f212d64767b4f066ca1c9ddc161a6ea5cf717aadf7f45e44bfe21856563e8d"),
    "sd2_mem.jsonl": (_ANISOTROPY, "fc2f6553f676e8fb94bf5b2eddfef80915131aeca23fa44e49c54edd6968ca74"),
    "RV_mem.txt": (_ANISOTROPY, "a23d5ac7a8f4fbfaa440ef6a793a55331a8a9e3416cda4dc58790b32b96fc392"),
    "RV_nmem.txt": (_ANISOTROPY, "da5fab8a0da55149d394efccc7a71058d9699a51f27bf90d31589cfe7ecfe713"),
    "memorized_laion_prompts.csv": (_LOCALIZING, "0b527a5965dc463e7a3e0d234ff7fd5489b1a76869c456dbb209dc753cb4af25"),
    "unmemorized_laion_prompts.csv": (_LOCALIZING, "f453b418cc157864baacbf68d97447273feac41e8066b2ead6b307bf795988e1"),
}


def fetch(out: Path, source: str | None = None) -> list[Path]:
    """Download the published lists into ``out``; those already there and right are left alone.

    Args:
        source: a folder or URL that holds the files under their names, instead of the public repositories.

    Raises:
        InputError: a file cannot be had, or its sha256 is not the pinned one.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{out}: cannot be written ({error.strerror})") from None
    paths = []
    for name, (repository, sha256) in PUBLISHED.items():
        path = out / name
        paths.append(path)
        if path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == sha256:
            continue
        origin = f"{source.rstrip('/')}/{name}" if source else f"{RAW}/{repository}/prompts/{name}"
        content = _get(origin)
        found = hashlib.sha256(content).hexdigest()
        if found != sha256:
            raise InputError(f"{origin}: sha256 is {found}, not the pinned {sha256}; nothing was written")
        part = path.with_suffix(path.suffix + ".part")
        part.write_bytes(content)
        part.replace(path)
    return paths


def _get(origin: str) -> bytes:
    try:
        if "://" not in origin:
            return Path(origin).read_bytes()
        with urllib.request.urlopen(origin, timeout=60) as response:
            return response.read()
    except (OSError, http.client.HTTPException) as error:  # URLError is an OSError
        reason = getattr(error, "reason", None) or getattr(error, "strerror", None) or error
        raise InputError(f"{origin}: cannot be had ({reason}); --from DIR|URL names a mirror") from None


def main() -> None:
    parser = ArgumentParser(description="Download the field's prompt lists (pinned commit, sha256 checked).")
    parser.add_argument("command", choices=["fetch"])
    parser.add_argument("--from", dest="source", metavar="DIR|URL", help="a mirror that holds the files by their names")
    parser.add_argument("--out", type=Path, default=ROOT / "prompts" / "published", help="default: prompts/published")
    args = parser.parse_args()
    for path in fetch(args.out, args.source):
        print(path)


if __name__ == "__main__":
    run_script(main)
