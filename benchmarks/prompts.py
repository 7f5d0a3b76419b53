"""What a list of a million prompts costs before its first score: ``python -m benchmarks.prompts [--count N]``

A process a line, so that each peak of memory is its own: the list is read and noted on, as detect_mem.py does before it
scores, with and without labels; and families are made of lists of several kinds. ``words``: words are drawn from the
shipped lists' and from a long tail; a fifth are near-copies. ``template``: the same sentence round a number.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from memorization.io.prompts import read_prompts
from memorization.paths import ROOT

KINDS = ("words", "template")
TASKS = ("first score, .txt", "first score, .csv", "first score, .jsonl", "families, words", "families, template")


def prompts_of(kind: str, count: int) -> list[str]:
    """A list of a kind."""
    if kind == "template":
        return [f"a picture of thing number {i} in blue" for i in range(count)]
    rng = np.random.default_rng(0)
    known = " ".join(read_prompts(ROOT / "prompts" / "testbed.csv")["prompt"]).replace('"', "").split()
    found = []
    for length in rng.integers(4, 17, count):
        common, rare = rng.integers(len(known), size=length), rng.pareto(0.7, length) * 20
        rest = rng.random(length) < 0.4
        found.append(
            " ".join(f"t{int(r)}" if tail else known[c] for c, r, tail in zip(common, rare, rest, strict=True))
        )
    for i in range(0, count, 5):
        found[(7 * i + 3) % count] = f"{found[i]} again"
    return found


def write(kind: str, suffix: str, count: int, folder: Path) -> Path:
    """The list as a file."""
    path, prompts = folder / f"list{suffix}", prompts_of(kind, count)
    lines = {
        ".txt": lambda: prompts,
        ".csv": lambda: ["prompt,kind", *(f'"{prompt}",x' for prompt in prompts)],
        ".jsonl": lambda: [json.dumps({"prompt": prompt, "kind": "x"}) for prompt in prompts],
    }[suffix]()
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def first_score(path: Path) -> None:
    """Seconds from the start to the first line of scores of the tiny pipeline, and the peak of memory."""
    started = time.perf_counter()
    code = """
import sys
import memorization.runs.store as store
def first(self, rows):
    from benchmarks.prompts import peak
    print(peak())
    sys.exit()
store.ResultStore.append = first
import detect_mem
detect_mem.main()
"""
    model = ROOT / "tests" / "golden" / "tiny-eps"
    command = [sys.executable, "-c", code, "--model", model, "--prompts", path, "--out", path.parent / "run"]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    print(f"{time.perf_counter() - started:7.1f} s  {float(done.stdout.split()[-1]):5.2f} GB", flush=True)


def peak() -> float:
    """GB of memory that this process has had at most; Linux alone says so (that of getrusage is the parent's too)."""
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1e6 for line in status if line.startswith("VmHWM"))


def families(kind: str, count: int) -> None:
    """Seconds and peak memory of the families of a list, which is made first."""
    from memorization.io.families import near_copy_families

    prompts = prompts_of(kind, count)
    started = time.perf_counter()
    found = len(set(near_copy_families(prompts)))
    print(f"{time.perf_counter() - started:7.1f} s  {peak():5.2f} GB  {found} families", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1_000_000, metavar="N")
    parser.add_argument("--task", choices=TASKS, help="one alone, in this process")
    args = parser.parse_args()
    if not args.task:
        for task in TASKS:
            print(f"{task:20}", end="", flush=True)
            subprocess.run([sys.executable, "-m", "benchmarks.prompts", "--count", str(args.count), "--task", task],
                           cwd=ROOT, check=True)  # fmt: skip
        return
    what, _, kind = args.task.partition(", ")
    if what == "families":
        families(kind, args.count)
        return
    with tempfile.TemporaryDirectory() as folder:
        first_score(write("words", kind, args.count, Path(folder)))


if __name__ == "__main__":
    main()
