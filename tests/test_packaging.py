"""The wheel, installed: it scores a checkpoint from a folder that is not the project's."""

import ast
import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import distribution, packages_distributions
from pathlib import Path

import pytest
from conftest import GOLDEN

from memorization import __version__

ROOT = GOLDEN.parent.parent
SHIPPED = ("pyproject.toml", "README.md", "LICENSE", "*.py", "memorization")


def pip(*arguments) -> None:
    options = ("--no-index", "--no-deps", "--quiet", "--disable-pip-version-check")
    subprocess.run([sys.executable, "-m", "pip", *map(str, arguments), *options], check=True)


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """A folder that the wheel was installed into."""
    folder = tmp_path_factory.mktemp("package")
    source, site = folder / "source", folder / "site"
    source.mkdir()
    for path in (path for pattern in SHIPPED for path in ROOT.glob(pattern)):
        if path.is_dir():
            shutil.copytree(path, source / path.name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(path, source)
    pip("wheel", source, "--no-build-isolation", "-w", folder)
    pip("install", *folder.glob("*.whl"), "--target", site)
    return site


def test_the_wheel_holds_what_it_should_and_no_more(site):
    assert {path.name for path in site.iterdir() if "info" not in path.suffix} - {"__pycache__"} == {
        "bin", "memorization", "detect_mem.py", "detect_eval.py", "mitigate_mem.py", "local_sd_pipeline.py",
        "optim_utils.py",
    }  # fmt: skip
    assert (site / "memorization" / "py.typed").is_file() and list((site / "memorization/configs").rglob("amg.yaml"))


# In one process, since importing torch takes most of the time.
BOTH = """
import runpy, sys
import memorization as mem
assert mem.__file__.startswith({site!r}), mem.__file__
frame = mem.score(mem.load("checkpoint"), ["a crab", "a tree"], detectors=["anisotropy"], noises=1)
assert len(frame) == 2, frame
script = {site!r} + "/bin/memorization"
sys.argv = [script, *"detect --model checkpoint --prompts prompts.txt --out run".split()]
runpy.run_path(script, run_name="__main__")
"""


def test_a_checkpoint_is_scored_from_another_folder(site, tmp_path):
    shutil.copytree(GOLDEN / "tiny-eps", tmp_path / "checkpoint")
    (tmp_path / "prompts.txt").write_text("a crab\na tree\n")
    environment = {**os.environ, "PYTHONPATH": str(site), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", BOTH.format(site=str(site))]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len((tmp_path / "run" / "scores.jsonl").read_text().splitlines()) == 2


def test_the_command_is_installed(site):
    environment = {**os.environ, "PYTHONPATH": str(site)}
    said = subprocess.run([site / "bin" / "memorization", "--version"], env=environment, capture_output=True, text=True)
    assert said.stdout.strip() == __version__


def test_what_is_imported_is_named_among_the_dependencies(site):
    (info,) = site.glob("*.dist-info")
    required = re.findall(r"^Requires-Dist: ([\w-]+)", (info / "METADATA").read_text(), flags=re.MULTILINE)
    named = {name.lower().replace("_", "-") for name in required}
    imported = set()
    for path in site.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            imported |= {name.split(".")[0] for name in names}
    ours = {path.stem for path in site.iterdir()}
    providers = packages_distributions()
    for name in sorted(imported - ours - set(sys.stdlib_module_names)):
        found = {distribution(other).metadata["Name"].lower().replace("_", "-") for other in providers.get(name, [])}
        not_installed = {name.replace("_", "-"), f"{name}-cpu"}  # of an extra
        assert (found or not_installed) & named, name
