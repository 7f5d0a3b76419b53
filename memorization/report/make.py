"""The report of any run: what kind it is, is told by what lies in its folder."""

from __future__ import annotations

from pathlib import Path

from memorization.errors import InputError
from memorization.io.files import write_atomically
from memorization.report import audit, detect, mitigate
from memorization.report.card import card
from memorization.report.common import complete_record, is_audit
from memorization.report.page import Page, Shown, html

KINDS = (audit, mitigate, detect)  # the first that fits


def read(folder: Path, hashed: bool) -> tuple[Page, dict]:
    """The page of the run in ``folder``, and its record.

    Raises:
        InputError: it holds no run that a report can be made of, one that is not complete, or a damaged one.
    """
    record = complete_record(folder)
    kind = next((kind for kind in KINDS if kind.fits(folder, record)), None)
    if kind is None:
        raise InputError(f"{folder}: no audit, detection or mitigation that a report can be made of")
    try:
        return kind.page(folder, record, Shown(hashed)), record
    except (KeyError, TypeError, IndexError, AttributeError, ValueError) as error:
        raise InputError(f"{folder}: damaged, or of another version ({type(error).__name__}: {error})") from None


def write_report(folder: Path, hashed: bool) -> Path:
    """``report.html`` in the run's folder."""
    page, _ = read(folder, hashed)
    path = folder / "report.html"
    write_atomically(path, html(page))
    return path


def model_card(folder: Path, hashed: bool) -> str:
    """The section of a model card, with its metadata."""
    page, record = read(folder, hashed)
    shown = Shown(hashed)
    return card(page, audit.findings_of(folder, record, shown) if is_audit(record) else None, record, shown)
