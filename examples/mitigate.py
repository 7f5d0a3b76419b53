"""Find the most memorized of some prompts and make it safe: python examples/mitigate.py [PICTURE.png]"""

import sys
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

import memorization as mem

LIST = Path(__file__).resolve().parent.parent / "prompts" / "testbed.csv"


def main(picture: str | None = None) -> None:
    prompts = pd.read_csv(LIST)
    prompts = prompts[(prompts["split"] == "test") & (prompts["label"] == 1)].head(3)
    model = mem.load("testbed-eps")
    frame = mem.score(model, prompts, detectors=["anisotropy"], noises=2)
    worst = max(zip(frame["anisotropy"], frame["prompt"], strict=True))[1]
    result = mem.mitigate(model, [worst], "sail", noises=4, steps=5)  # the same prompt from other noise
    print(result.frame[["prompt", "clip_before", "clip_after"]].to_string(index=False))
    if picture:  # above the pictures before, below those after
        rows = [np.concatenate(list(pictures[0]), axis=1) for pictures in (result.before, result.after)]
        Image.fromarray(np.concatenate(rows)).save(picture)


if __name__ == "__main__":
    main(*sys.argv[1:])
