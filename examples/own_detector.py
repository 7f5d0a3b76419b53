"""A detector of your own, registered from outside the package: python examples/own_detector.py"""

from dataclasses import dataclass
from typing import ClassVar

import memorization as mem
from memorization.detectors.base import PromptDetector


@mem.register_detector
@dataclass(frozen=True)
class Peak(PromptDetector):
    """``peak``: the guidance vector's largest entry at the noisiest step, raised to ``power``."""

    power: float = 1.0  # a setting, checked by its annotation: settings={"peak": {"power": 2}}

    name: ClassVar[str] = "peak"
    steps: ClassVar[tuple[int, ...]] = (0,)
    terms: ClassVar[tuple[str, ...]] = ("peak",)

    def __call__(self, trace):
        guidance = trace[0].guidance  # eps_c - eps_u, (prompts, noises, c, h, w), whatever the checkpoint predicts
        return {"peak": guidance.flatten(2).abs().amax(2) ** self.power}


def main() -> None:
    frame = mem.score(
        mem.load("testbed-eps"), ["a picture of crab", "a tree under a red sky"], detectors=["peak"], noises=2
    )
    print(frame[["prompt", "peak"]].to_string(index=False))


if __name__ == "__main__":
    main()
