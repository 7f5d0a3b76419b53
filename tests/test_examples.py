"""The examples run and print what they say."""

import runpy

import mitigate
import pytest
import quickstart
from conftest import GOLDEN
from PIL import Image

from memorization.detectors.base import DETECTORS

ROOT = GOLDEN.parent.parent


def test_quickstart(capsys):
    quickstart.main()
    said = capsys.readouterr().out
    assert "anisotropy" in said and "auc" in said


def test_own_detector(capsys, monkeypatch):
    monkeypatch.setattr(DETECTORS, "_found", dict(DETECTORS._found))  # registered for this test alone
    runpy.run_path(str(ROOT / "examples" / "own_detector.py"), run_name="__main__")
    assert "peak" in capsys.readouterr().out


def test_mitigate(capsys, tmp_path):
    mitigate.main(str(tmp_path / "made.png"))
    assert "clip_after" in capsys.readouterr().out
    assert Image.open(tmp_path / "made.png").size == (4 * 64, 2 * 64)


@pytest.mark.parametrize("name", ["quickstart", "own_detector", "mitigate"])
def test_examples_are_short(name):
    assert len((ROOT / "examples" / f"{name}.py").read_text().splitlines()) < 40
