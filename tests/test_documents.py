"""The documents: tables that say what the files under results/ do, links that lead somewhere, short lines."""

import re

import pytest
from conftest import GOLDEN
from write_tables import documents, filled

from memorization.detectors.base import DETECTORS
from memorization.mitigations.base import MITIGATIONS

ROOT = GOLDEN.parent.parent
DOCUMENTS = documents()


@pytest.fixture(params=DOCUMENTS, ids=[path.relative_to(ROOT).as_posix() for path in DOCUMENTS])
def document(request):
    return request.param


def test_tables_are_those_of_the_results(document):
    text = document.read_text(encoding="utf-8")
    assert filled(text) == text, "python docs/write_tables.py writes them"


def test_every_table_of_results_is_written_by_a_command():
    for path in (ROOT / "docs" / "results").glob("*.md"):
        outside = re.sub(r"<!-- table: .*?<!-- end -->", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
        assert "\n|" not in outside, path


def test_lines_are_short(document):
    lines = document.read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if len(line) > 120 and not line.startswith("|")] == []


def test_links_lead_to_files_and_headings(document):
    text = re.sub(r"```.*?```", "", document.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        place, _, heading = target.partition("#")
        if "://" in target:
            continue
        there = (document.parent / place).resolve() if place else document
        assert there.exists(), target
        if heading:
            titles = re.findall(r"^#+ (.+)$", there.read_text(encoding="utf-8"), flags=re.MULTILINE)
            assert heading in [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles], target


@pytest.mark.parametrize("kind", ["detectors", "mitigations"])
def test_every_method_is_in_the_documents(kind):
    methods = {"detectors": DETECTORS, "mitigations": MITIGATIONS}[kind]
    text = (ROOT / "docs" / f"{kind}.md").read_text(encoding="utf-8")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    built_in = [name for name in methods if methods[name].__module__.startswith("memorization.")]
    assert built_in and all((f"## {name}\n" in text or f"| `{name}` |" in text) for name in built_in)
    assert all(f"`{name}`" in readme for name in built_in)


def test_readme_is_read_in_three_minutes():
    assert (ROOT / "README.md").stat().st_size <= 8000
