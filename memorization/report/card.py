"""A section of a model card: Markdown, under metadata in the form of huggingface_hub."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import EvalResult, ModelCardData

from memorization.audit.findings import CONFIDENCE
from memorization.io.tables import markdown
from memorization.report.gate import counts_of
from memorization.report.page import Page, Shown, Table


def card(page: Page, found: dict | None, record: dict, shown: Shown) -> str:
    """The metadata block and the section.

    Args:
        found: of an audit; None of another run, whose section has no metrics.
    """
    model = record["settings"]["model"]
    name = found["epochs"][-1]["name"] if found else shown.text(model)
    base = model if found and not shown.hashed and not Path(model).exists() else None  # the hub takes ids alone
    data = ModelCardData(model_name=name, base_model=base, tags=["memorization"],
                         eval_results=results(found, record) if found else None)  # fmt: skip
    tables = [f"### {table.title}\n\n{as_markdown(table)}" for table in page.tables[:1]] if found else []
    parts = [
        f"## {page.title}",
        "\n\n".join(page.summary),
        *tables,
        "### Limits and method\n\n" + "\n".join(f"- {name}: {text}" for name, text in page.method),
        "### What this does not show\n\n" + "\n".join(f"- {sentence}" for sentence in page.evidence),
    ]
    return f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n"


def results(found: dict, record: dict) -> list[EvalResult]:
    """What the gate decides on, at the last epoch: a share of copies alone would count those that the base has too."""
    last = found["epochs"][-1]
    count = counts_of(found)[last["name"]]
    values = {
        "pictures of the captions": count.trials, "copies where the base has none": count.hits,
        "copies of the base where it has none": count.lost,
        "share of copies less that of the base, upper end of 95%": count.upper(CONFIDENCE, count.trials),
        "training pictures that count as copied": len(count.copied), "text alignment": last["alignment"],
    }  # fmt: skip
    return [
        EvalResult(
            task_type="text-to-image", dataset_type="training-set",
            dataset_name="its own training pictures and captions", dataset_revision=record["settings"]["training"],
            metric_type=name.replace(" ", "_").replace(",", "").replace("%", ""), metric_name=name, metric_value=value,
        )
        for name, value in values.items() if value is not None
    ]  # fmt: skip


def as_markdown(table: Table) -> str:
    """A table of a page; a bar in a cell stays in it."""
    import pandas as pd

    cells = [[str(cell).replace("|", "\\|") for cell in row] for row in table.rows]
    return markdown(pd.DataFrame(cells, columns=list(table.columns)))
