"""Which method works on which family: ``python tests/family_table.py`` writes results/families.csv.

By what methods ask and what tiny pipelines of random weights can; tests/test_families.py runs what is said to work.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import pandas as pd  # noqa: E402
import tiny_families  # noqa: E402
from conftest import load_tiny  # noqa: E402

from memorization.detectors.base import DETECTORS  # noqa: E402
from memorization.mitigations.base import MITIGATIONS  # noqa: E402
from memorization.models.families.base import FAMILIES  # noqa: E402
from memorization.models.pipelines import replayed  # noqa: E402

TABLE = ROOT / "results" / "families.csv"


def models() -> dict:
    """Family -> a tiny model of it."""
    others = [name for name in FAMILIES if hasattr(tiny_families, name)]
    made = {name: replayed(getattr(tiny_families, name)(), name) for name in others}
    return {"stable_diffusion": load_tiny("tiny-eps", pictures=True), **made}


def needed(method) -> str:
    """What a method needs beside the model."""
    if getattr(method, "needs_index", False):
        return "an index"
    return "a calibration or a target" if getattr(method, "lowers", None) else getattr(method, "needs", "")


def table() -> pd.DataFrame:
    """A row a method: its kind, what else it needs, and of every family ``works``, or what the family has not."""
    known = models()
    return pd.DataFrame([
        {
            "method": name, "kind": kind, "needs": needed(methods[name]),
            **{family: "no " + " and ".join(missing) if (missing := sorted(set(methods[name].asks) - model.can))
               else "works" for family, model in known.items()},
        }
        for kind, methods in (("detector", DETECTORS), ("mitigation", MITIGATIONS))
        for name in methods
    ])  # fmt: skip


if __name__ == "__main__":
    table().to_csv(TABLE, index=False, lineterminator="\n")
