"""The counts of docs/reliability.md are those of the tests."""

import re

import pytest
import test_fault_files
import test_fault_inputs
import test_fault_settings
from conftest import GOLDEN
from faults import cases_of

PAGE = (GOLDEN.parent.parent / "docs" / "reliability.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("module", [test_fault_settings, test_fault_files, test_fault_inputs])
def test_counts(module):
    (said,) = re.findall(rf"\| `tests/{module.__name__}.py` \| (\d+) \|", PAGE)
    assert int(said) == cases_of(module)
