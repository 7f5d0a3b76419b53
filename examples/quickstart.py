"""Score a list of prompts and see how well the scores tell memorized ones from others: python examples/quickstart.py"""

from pathlib import Path

import pandas as pd

import memorization as mem

LIST = Path(__file__).resolve().parent.parent / "prompts" / "testbed.csv"


def main() -> None:
    prompts = pd.read_csv(LIST)
    prompts = prompts[prompts["split"] == "test"].groupby("label").head(15)  # 15 memorized, 15 not
    model = mem.load("testbed-eps")  # a name, a folder in diffusers format, or a hub id
    frame = mem.score(model, prompts, detectors=["anisotropy", "noise_norm"], noises=2)
    frame["score"] = frame["anisotropy"].map(lambda values: sum(values) / len(values))  # a value a noise
    print(frame.nlargest(5, "score")[["prompt", "label", "score"]].to_string(index=False))
    print(mem.evaluate(frame).round(3).to_string(index=False))


if __name__ == "__main__":
    main()
