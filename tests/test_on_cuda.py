"""The benchmark for a CUDA card, on the CPU with tiny networks: what it writes, and how its figures are made."""

import json
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
import write_tables
from torch.nn.functional import scaled_dot_product_attention

from benchmarks import denoisers, figures, on_cuda
from benchmarks.figures import Figures, speed_rows
from memorization.errors import InputError


def test_smoke_goes_the_whole_way(run_script, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(on_cuda, "run_tests", lambda: {"failed": [], "tests": {"test_a": "passed"}})
    run_script(on_cuda, "--smoke", "--out", tmp_path / "new" / "figures.json")
    rows = json.loads((tmp_path / "new" / "figures.json").read_text())["rows"]
    assert not [row for row in rows if "error" in row]
    parts = {name: [row for row in rows if row["part"] == name] for name in ("tests", "scores", "speed")}
    assert parts["tests"][0]["tests"] == {"test_a": "passed"} and len(parts["scores"]) == 6
    for row in parts["scores"]:
        assert (row["norm"]["largest relative difference"] == 0) == (row["dtype"] == "float32")
        assert 0.9 < row["norm"]["Spearman"] <= 1 and 0 <= row["norm"]["AUC on the CPU"] <= 1
    ways = {(row["network"], row["what"], row["how"]) for row in parts["speed"]}
    scored = [("SD 1.4", what, how) for what in (figures.BARE, figures.TOOL) for how in ("eager", "torch.compile")]
    others = [(name, figures.BARE, "eager") for name in figures.NETWORKS[1:]]
    assert ways == {("SD 1.4", figures.PLAIN, "eager"), *scored, *others}
    assert all(row["seconds a row"] > 0 and row["TFLOP/s"] > 0 for row in parts["speed"])
    assert all(row["relative difference"] < 0.02 for row in parts["speed"] if row["what"] == figures.BARE)
    said = capsys.readouterr().out
    assert "AUC difference" in said and "times the plain loop" in said


def test_only_marked_tests_are_run_and_their_ends_are_noted(tmp_path, monkeypatch, capsys):
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_cuda.py").write_text("""
import pytest
@pytest.mark.cuda
def test_good(): pass
@pytest.mark.cuda
def test_bad(): assert 1 == 2
@pytest.mark.cuda
@pytest.mark.skip
def test_skipped(): pass
def test_unmarked(): pass
""")
    (tmp_path / "tests" / "test_b.py").write_text("raise SystemError\n")  # other files are not imported
    monkeypatch.setattr(on_cuda, "ROOT", tmp_path)
    found = on_cuda.run_tests()
    assert found["tests"] == {"test_good": "passed", "test_bad": "failure", "test_skipped": "skipped"}
    assert found["failed"] == ["test_bad"] and "1 == 2" in capsys.readouterr().err


def test_all_marked_tests_lie_in_one_file():
    tests = Path(__file__).parent
    marked = {path.name for path in tests.glob("test_*.py") if "pytest.mark.cuda" in path.read_text()}
    assert marked == {"test_cuda.py", Path(__file__).name}  # this one holds them as text


def test_a_halved_batch_is_no_row_of_a_call_that_it_missed(monkeypatch):
    network = on_cuda.Network("SD 1.4", torch.device("cpu"), on_cuda.SMOKE)
    network.pipe = SimpleNamespace(unet=torch.nn.Identity(), to=lambda dtype: network.pipe)
    network.flops, network.fast = 1, lambda *way: None
    for used, how in ((2, "CUDA graph"), (1, "eager"), (1, "CUDA graph")):
        monkeypatch.setattr(on_cuda, "this_tool", lambda *_, used=used: (0.5, used))
        if (used, how) == (1, "CUDA graph"):
            with pytest.raises(torch.OutOfMemoryError, match="only 1 rows fit"):
                network.tool("bfloat16", 2, how)
        else:
            assert network.tool("bfloat16", 2, how)["batch used"] == used


def test_without_a_card_one_line_says_so(run_script, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="no CUDA card here; --smoke"):
        run_script(on_cuda)


def test_figures_are_kept_row_by_row_and_gone_on_with(tmp_path):
    path, calls = tmp_path / "a.json", []

    def work():
        calls.append(1)
        return {"value": len(calls)}

    def killed():
        raise KeyboardInterrupt

    first = Figures(path, {"card": "A"}, 100)
    first.measure({"row": 1}, work)
    first.measure({"row": 2}, lambda: 1 / 0)
    first.measure({"row": 3}, work, seconds=101)
    with pytest.raises(KeyboardInterrupt):
        first.measure({"row": 4}, killed)
    assert json.loads(path.read_text())["rows"] == first.rows and first.left == [{"row": 3}]
    assert first.rows == [{"row": 1, "value": 1}, {"row": 2, "error": "ZeroDivisionError: division by zero"}]
    assert first.failed == first.rows[1:]
    again = Figures(path, {"card": "A"}, 100)
    for row in (1, 2, 3):
        again.measure({"row": row}, work)
    assert [row["value"] for row in again.rows] == [1, 2, 3] and not again.failed and not again.left
    again.measure({"row": 4}, lambda: {"failed": ["test_a"]})
    assert again.failed == [{"row": 4, "failed": ["test_a"]}]
    assert [row["row"] for row in Figures(path, {"card": "A"}, 100).rows] == [1, 2, 3]
    with pytest.raises(InputError, match="another card"):
        Figures(path, {"card": "B"}, 100)
    assert Figures(path, {"card": "B"}, 100, overwrite=True).rows == []


def test_a_card_that_is_too_small_is_no_failure(tmp_path):
    def work():
        raise torch.OutOfMemoryError("CUDA out of memory.")

    small = Figures(tmp_path / "a.json", {}, 100)
    small.measure({"row": 1}, work)
    assert "out of memory" in small.rows[0]["error"] and not small.failed


def test_the_table_divides_by_the_plain_loop_and_keeps_the_fastest():
    common = {"part": "speed", "network": "SD 1.4", "dtype": "bfloat16", "how": "eager"}
    rows = [
        {**common, "what": figures.PLAIN, "batch": 2, "seconds a row": 0.01, "seconds a prompt": 0.08},
        {**common, "what": figures.TOOL, "batch": 8, "seconds a row": 0.004, "seconds a prompt": 0.008},
        {**common, "what": figures.TOOL, "batch": 64, "seconds a row": 0.002, "seconds a prompt": 0.004,
         "share of peak": 0.5, "batch used": 32},
        {**common, "what": figures.TOOL, "batch": 128, "error": "OutOfMemoryError: no"},
    ]  # fmt: skip
    assert [row["times the plain loop"] for row in speed_rows(rows)] == ["1", "10", "20", ""]
    assert [row["batch"] for row in speed_rows(rows, best=True)] == [2, 32]
    assert [row["ms a row"] for row in speed_rows(rows)] == ["10", "4", "2", "OutOfMemoryError: no"]


def test_scores_are_compared_with_themselves_and_with_their_spread():
    cpu, card = np.array([1.0, 2, 3, 4]), np.array([1.0, 2.2, 2.1, 4])
    row = on_cuda.compare({"norm": cpu}, {"norm": card}, pd.Series([0, 0, 1, 1]))["norm"]
    assert row == pytest.approx({
        "largest relative difference": 0.3, "largest difference / spread": 0.9 / 1.25**0.5, "Spearman": 0.8,
        "AUC on the CPU": 1, "AUC difference": -0.25,
    })  # fmt: skip


def test_flops_are_those_of_the_products_and_of_attention():
    query, key = torch.ones(1, 2, 8, 4), torch.ones(1, 2, 16, 4)
    found = denoisers.flops_of(lambda: scaled_dot_product_attention(query, key, key) @ torch.ones(4, 5))
    assert found == 2 * (2 * 8 * 16 * 4) * 2 + 2 * 8 * 4 * 5 * 2


@torch.no_grad()
def test_calls_of_the_batch_alone_go_through_the_fast_call(tiny_eps):
    latents, embeds = tiny_eps.pure_noise(2, 1), tiny_eps.embed(["a kite", "a boat"])
    expected = [tiny_eps.predict_noise(latents[:n], 41, embeds[:n]) for n in (1, 2)]
    plain = denoisers.plain_call(tiny_eps.unet)
    with denoisers.in_place(tiny_eps.unet, lambda **given: 2 * plain(**given), 2):
        assert torch.equal(tiny_eps.predict_noise(latents[:1], 41, embeds[:1]), expected[0])
        assert torch.equal(tiny_eps.predict_noise(latents, 41, embeds), 2 * expected[1])
    assert torch.equal(tiny_eps.predict_noise(latents, 41, embeds), expected[1])


@pytest.mark.parametrize("name", figures.NETWORKS)
def test_networks_have_their_true_size(name):
    """Parameters of the published checkpoints, in millions."""
    network = on_cuda.FULL.networks[name]
    with torch.device("meta"):
        module = network.cls(**network.config)
    size = {"SD 1.4": 860, "SDXL": 2567, "SD 3": 2029, "Flux.1": 11901}[name]
    assert sum(weights.numel() for weights in module.parameters()) / 1e6 == pytest.approx(size, abs=1)


def test_what_is_timed_is_timed(tmp_path):
    network = on_cuda.Network("SD 3", torch.device("cpu"), on_cuda.SMOKE)
    row = network.timed(4, lambda: time.sleep(0) or 2.0)
    assert row["seconds a row"] == 0.5 and row["TFLOP/s"] == pytest.approx(4 * network.flops / 2 / 1e12)
    assert row["share of peak"] is None and row["peak memory, GiB"] is None


def test_documents_have_the_figures_of_every_card(tmp_path, monkeypatch):
    assert "bare calls" in write_tables.cuda_speed() and "testbed-v" in write_tables.cuda_scores()
    measured = {"largest relative difference": 0.25, "Spearman": 0.5}
    rows = [
        {"part": "scores", "model": "m", "dtype": "float16", "prompts": 4, **dict.fromkeys(figures.SCORES, measured)},
        {"part": "speed", "network": "SDXL", "dtype": "float16", "what": figures.BARE, "how": "eager", "batch": 4,
         "seconds a row": 0.002, "share of peak": 0.5},
    ]  # fmt: skip
    (tmp_path / "speed").mkdir()
    for card in "AB":
        path = tmp_path / "speed" / f"cuda-{card}.json"
        path.write_text(json.dumps({"about": {"card": card}, "rows": rows}))
    monkeypatch.setattr(write_tables, "RESULTS", tmp_path)
    speed, scores = (
        [[cell.strip() for cell in line.split("|")[1:-1]] for line in made.splitlines()[2:]]
        for made in (write_tables.cuda_speed(), write_tables.cuda_scores())
    )
    assert speed == [[card, "SDXL", "float16", "bare calls", "eager", "4", "2", "", "", "50%", ""] for card in "AB"]
    assert [line[:4] for line in scores] == [[c, "m", "float16", score] for c in "AB" for score in figures.SCORES]
    assert {tuple(line[4:]) for line in scores} == {("4", "0.25", "0.5")}
