"""Tiny pipelines and small helpers shared by the tests."""

import json
import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # read when the hub client is imported

import pandas as pd
import pytest
import torch

from memorization.index.build import build_index
from memorization.models.loading import load_pipeline
from memorization.models.spec import ModelSpec
from memorization.paths import ROOT

GOLDEN = Path(__file__).parent / "golden"
PROMPTS = ["a harbour at dusk with two boats", "red kite", "", "portrait of an old clockmaker, oil on canvas", "kite"]


def load_tiny(name: str, dtype: str = "float32", device: str = "cpu", **options):
    return load_pipeline(ModelSpec(name, (str(GOLDEN / name),)), dtype, torch.device(device), **options)


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("cuda"):
                item.add_marker(pytest.mark.skip(reason="no CUDA card here"))


@pytest.fixture(scope="session")
def tiny_eps():
    return load_tiny("tiny-eps")


@pytest.fixture(scope="session")
def tiny_v():
    return load_tiny("tiny-v")


@pytest.fixture(scope="session")
def audited_place(tmp_path_factory):
    """A folder with ``lora/``, ``set/``, an audit of both in ``out/``, and in ``killed/`` what lay there when it
    was half done; nobody changes them."""
    import audited

    return audited.save_audit(tmp_path_factory.mktemp("audit"))


@pytest.fixture
def prompt_file(tmp_path):
    """A labelled list in JSON Lines."""
    path = tmp_path / "list.jsonl"
    rows = [{"prompt": f"{text} {i}", "label": i % 2, "family": f"f{i // 2}"} for i in range(4) for text in PROMPTS]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def run_script(monkeypatch):
    """Call a script's main with arguments, in this process."""

    def call(module, *arguments):
        monkeypatch.setattr(sys, "argv", [module.__name__ + ".py", *map(str, arguments)])
        module.main()

    return call


@pytest.fixture(scope="session")
def pictures_index(tmp_path_factory):
    """Of training pictures of the testbed, all of them near enough for the gate of amg."""
    folder = tmp_path_factory.mktemp("index")
    images = sorted(f"testbed/pictures/{path.name}" for path in (ROOT / "testbed" / "pictures").glob("*.png"))[:60]
    pd.DataFrame({"prompt": "a picture", "image": images}).to_csv(folder / "list.csv", index=False)
    build_index(folder / "list.csv", folder / "index", "pixels", (8, 8))
    return str(folder / "index")
