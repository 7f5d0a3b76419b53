"""The engine of comparisons: what is made is made and measured once, and the table says what the lines say."""

import shutil

import numpy as np
import pandas as pd
import pytest
from conftest import GOLDEN

from memorization.errors import InputError
from memorization.evaluation.calibration import CalibratedDetector, Calibration
from memorization.io.files import read_json
from memorization.io.pictures import read_picture
from memorization.io.prompts import read_prompts
from memorization.mitigations.cwr import WordRepetition
from memorization.mitigations.gni import EmbeddingNoise
from memorization.runs.store import ResultStore
from memorization.similarity import judge
from memorization.similarity.judge import Judge, TrainingPictures, copy_limits
from memorization.studies import compare_report, mitigation_tradeoff
from memorization.studies.compare import PLAIN, Batch, Comparison, Item, Made, Row
from memorization.studies.compare_report import (
    draw_sheet,
    read_comparison,
    shown_pictures,
    table_of,
    table_of_run,
)

ROOT = GOLDEN.parent.parent
ITEMS = [Item("a red kite", 1, "kite"), Item("two boats", 1, "boats"), Item("a clock", 0, "clock")]


class Maker:
    """Makes pictures of one grey; counts how often; may be killed at a batch."""

    def __init__(self, grey, killed_at=None):
        self.grey, self.killed_at, self.made = grey, killed_at, []

    def batches(self):
        return [Batch(ITEMS[:2], lambda: self.make(0, 2)), Batch(ITEMS[2:], lambda: self.make(1, 1))]

    def make(self, number, count):
        if number == self.killed_at:
            raise KeyboardInterrupt
        self.made.append(number)
        pictures = np.full((2, 8, 8, 3), self.grey, np.uint8)
        return [Made(pictures, {"nl2": [self.grey / 100, 2.0], "seconds": 1.0}) for _ in range(count)]


def store(folder):
    return ResultStore(folder, {"seed": 0}, {})


def fill(folder, *rows):
    with store(folder) as opened:
        comparison = Comparison(opened, {"nl2": 1.5})
        for row, maker in rows:
            comparison.fill(row, maker.batches())


def test_rows_are_made_once_and_may_be_added(tmp_path):
    plain, weak, strong = Maker(100), Maker(110), Maker(151)
    rows = [(Row(PLAIN, PLAIN), plain), (Row("gni 0.1", "gni", EmbeddingNoise(0.1)), weak)]
    fill(tmp_path, *rows)
    fill(tmp_path, *rows, (Row("gni 4", "gni", EmbeddingNoise(4.0)), strong))
    assert plain.made == weak.made == strong.made == [0, 1]
    lines, run = read_comparison(tmp_path)
    assert lines["id"].tolist() == list(range(9)) and lines["item"].tolist() == [0, 1, 2] * 3
    assert lines["strength"].iloc[-1] == 4 and list(run["rows"]) == [PLAIN, "gni 0.1", "gni 4"]
    assert lines.groupby("row")["moved"].first().to_dict() == {
        PLAIN: 0,
        "gni 0.1": 0.0784,
        "gni 4": 0.4,
    }  # 10, 51 / 127.5
    assert len(list((tmp_path / "gni 4").glob("*.png"))) == 6
    with pytest.raises(InputError, match="holds a row 'gni 4' of other settings"):
        fill(tmp_path, (Row("gni 4", "gni", EmbeddingNoise(5.0)), strong))


def test_a_killed_comparison_goes_on_to_the_same(tmp_path):
    rows = [(Row(PLAIN, PLAIN), Maker(100)), (Row("gni 1", "gni", EmbeddingNoise(1.0)), Maker(120))]
    fill(tmp_path / "whole", *rows)
    with pytest.raises(KeyboardInterrupt):
        fill(tmp_path / "killed", rows[0], (rows[1][0], Maker(120, killed_at=1)))
    assert read_comparison(tmp_path / "killed")[0]["row"].unique().tolist() == [PLAIN]  # half a row is none
    log = tmp_path / "killed" / "scores.jsonl"
    log.write_bytes(log.read_bytes()[:-30])  # a line was torn: of its batch, whose other line is whole
    again = Maker(120)
    fill(tmp_path / "killed", rows[0], (rows[1][0], again))
    assert again.made == [0, 1] and log.read_bytes() == (tmp_path / "whole" / "scores.jsonl").read_bytes()


def test_what_is_run_is_written_down_before_it_is_made_and_then_left(tmp_path):
    row = Row("gni 1", "gni", EmbeddingNoise(1.0))
    with store(tmp_path) as opened:
        comparison = Comparison(opened, {"nl2": 1.5})
        comparison.fill(Row(PLAIN, PLAIN), Maker(100).batches())
        with pytest.raises(KeyboardInterrupt):
            comparison.fill(row, Maker(120, killed_at=0).batches())
        assert read_json(tmp_path / "run.json")["rows"]["gni 1"] == row.record()  # though nothing has been closed
    fill(tmp_path, (Row(PLAIN, PLAIN), Maker(100)), (row, Maker(120)))
    finished = (tmp_path / "run.json").read_bytes()
    fill(tmp_path, (Row(PLAIN, PLAIN), Maker(100)), (row, Maker(120)))
    assert (tmp_path / "run.json").read_bytes() == finished


def test_a_folder_without_its_pictures_says_so(tmp_path):
    fill(tmp_path, (Row(PLAIN, PLAIN), Maker(100)))
    shutil.rmtree(tmp_path / PLAIN)
    with pytest.raises(InputError, match=r"0000-0\.png: not there, though its line is"):
        fill(tmp_path, (Row(PLAIN, PLAIN), Maker(100)), (Row("gni 1", "gni", EmbeddingNoise(1.0)), Maker(120)))


def lines_of(row, nl2, label, **more):
    return {"row": row, "method": row.split()[0], "strength": 1.0, "item": 0, "label": label, "nl2": nl2, "moved": 0.1,
            "family": "f", "seconds": 1.0, "seconds_generation": 2.0, **more}  # fmt: skip


def test_the_table_says_what_the_lines_say():
    lines = pd.DataFrame([
        lines_of(PLAIN, [0.5, 1.0], 1, family="a", sscd=[0.9, 0.6], clip=[0.8, 0.6], colour=[1, 1]),
        lines_of(PLAIN, [1.3, 1.5], 1, family="b", sscd=[0.45, 0.1], clip=[0.7, 0.7], colour=[1, 0], item=1),
        lines_of(PLAIN, [1.9, 1.0], 0, sscd=[0, 0], clip=[0.5, 0.5], colour=[1, 1], item=2),
        lines_of("x 1", [1.1, 1.7], 1, family="a", sscd=[0.3, 0.2], clip=[0.6, 0.6], colour=[0, 0]),
        lines_of("x 1", [1.8, 1.8], 1, family="b", sscd=[0.2, 0.2], clip=[0.4, 0.4], colour=[0, 1], item=1, seconds=3.0,
                 ),
        lines_of("x 1", [1.9, 1.0], 0, sscd=[0, 0], clip=[0.4, 0.5], colour=[0, 0], item=2, moved=0.3),
    ])  # fmt: skip
    table = table_of(lines, {"nl2": 1.2, "sscd": 0.5}, 200, {"x 1": 7.0}).set_index("row")
    plain, row = table.loc[PLAIN], table.loc["x 1"]
    assert (plain["copies"], row["copies"]) == (0.5, 0.25)  # of memorized prompts alone
    assert (plain["copies low"], plain["copies high"]) == (0, 1) and row["copies high"] == 0.5  # families are drawn
    assert plain["copies by sscd"] == 0.5 and row["copies by sscd"] == 0
    assert plain["nl2 < 1.4"] == 0.75 and plain["sscd > .4"] == 0.75 and plain["sscd > .5"] == 0.5
    assert row["nl2 lowest"] == 1.1 and plain["sscd highest"] == 0.9
    assert row["clip"] == pytest.approx(0.5) and row["ordinary: clip change"] == pytest.approx(-0.05)
    assert row["colour"] == 0.25 and row["ordinary: colour change"] == -1  # a measure from outside
    assert row["ordinary: picture change"] == 0.3 and row["seconds"] == 2 and row["Frechet"] == 7


def test_copies_are_counted_by_the_models_limits_or_the_fields():
    assert copy_limits({"nl2": 1.2}) == {"nl2": 1.2, "sscd": 0.5}
    assert list(copy_limits({"nl2_object": 1.0})) == ["nl2_object", "nl2", "sscd"]


def test_a_measure_from_outside_may_decide_what_is_a_copy():
    lines = pd.DataFrame([lines_of(PLAIN, [2.0, 2.0], 1, nl2_object=[0.5, 1.5])])
    row = table_of(lines, {"nl2_object": 1.0, "nl2": 2.5}, 10).iloc[0]
    assert row["copies"] == 0.5 and row["copies by nl2"] == 1 and row["nl2_object"] == 1


def test_a_comparison_takes_measures_from_outside(tmp_path, monkeypatch):
    def brightness(pictures, prompt):
        return pictures.mean((1, 2, 3)) / 255

    monkeypatch.setattr(judge, "find_weights", lambda: None)
    monkeypatch.setattr(WordRepetition, "strengths", (1, 4))
    command = ("--model", "testbed-eps", "--memorized", 1, "--ordinary", 1, "--steps", 3, "--noises", 1, "--methods",
               "cwr", "--resamples", 100, "--out", tmp_path)  # fmt: skip
    mitigation_tradeoff.main(list(map(str, command)), {"brightness": brightness})
    lines, run = read_comparison(tmp_path)
    pictures = read_picture(tmp_path / "cwr 1" / "0000-0.png", None)
    line = lines[(lines["row"] == "cwr 1") & (lines["item"] == 0)].iloc[0]
    assert line["brightness"] == pytest.approx([pictures.mean() / 255], abs=1e-4)
    assert run["settings"]["judge"]["others"] == ["brightness"]
    assert "ordinary: brightness change" in pd.read_csv(tmp_path / "table.csv")


def test_columns_of_the_sheet_are_the_nearest_copies():
    lines = pd.DataFrame([{**lines_of(PLAIN, nl2, label), "item": item} for item, (nl2, label) in enumerate(
        [([1.0, 0.3], 1), ([1.5, 1.5], 0), ([0.2, 0.9], 1), ([0.5, 0.4], 1)])])  # fmt: skip
    assert shown_pictures(lines) == [(2, 0), (0, 1), (3, 1), (1, 0)]


def test_the_sheet_has_a_strip_a_whole_row(tmp_path, monkeypatch):
    fill(tmp_path, (Row(PLAIN, PLAIN), Maker(100)), (Row("gni 1", "gni", EmbeddingNoise(1.0)), Maker(120)))
    known = TrainingPictures(np.stack([np.full((8, 8, 3), grey, np.uint8) for grey in (0, 90, 200)]))
    with store(tmp_path) as opened:
        monkeypatch.setattr(compare_report, "draw_strips", lambda strips, path: strips)
        strips = draw_sheet(Comparison(opened, {}), ["gni 1", "gni 4"], ITEMS, Judge(known), tmp_path / "sheet.png")
    training, *others = strips.values()
    assert [picture[0, 0, 0] for picture in training] == [90, 90, 90]  # the nearest to 100
    assert list(strips)[1:] == [PLAIN, "gni 1"] and [strip[0][0, 0, 0] for strip in others] == [100, 120]


def test_committed_tables_follow_from_their_lines():
    runs = [path for path in (ROOT / "results").glob("**/run.json") if "copy_limits" in read_json(path)]
    runs = [path for path in runs if "guard" not in path.parts]  # a table of its own
    assert runs
    for path in runs:
        committed, made = pd.read_csv(path.parent / "table.csv"), table_of_run(path.parent)
        pd.testing.assert_frame_equal(committed, made.round(4).reset_index(drop=True), check_dtype=False)


def test_copies_need_a_measure(run_script, tmp_path, monkeypatch):
    monkeypatch.setattr(judge, "find_weights", lambda: None)
    frame = read_prompts(ROOT / "prompts" / "testbed.csv")
    pd.concat([frame[frame["label"] == label].head(9) for label in (0, 1)]).to_csv(tmp_path / "few.csv", index=False)
    with pytest.raises(InputError, match=r"names \d+ training pictures; copies are counted by nL2, which needs 50"):
        run_script(mitigation_tradeoff, "--model", GOLDEN / "tiny-eps", "--prompts", tmp_path / "few.csv", "--split",
                   "all", "--dtype", "float32", "--out", tmp_path / "out")  # fmt: skip


def test_methods_whose_level_is_not_known_are_left_out_of_all():
    known = Calibration(detectors={"noise_norm": CalibratedDetector(1.0, levels={0.5: 1.0}),
                                   "second_look": CalibratedDetector(1.0)})  # fmt: skip
    assert mitigation_tradeoff.without_levels(known) == ["anisotropy", "second_look", "rewrite"]


def test_levels_hold_for_the_calibrations_noises(run_script, tmp_path):
    common = ("--model", "testbed-eps", "--memorized", 1, "--ordinary", 1, "--steps", 3, "--out", tmp_path / "out")
    with pytest.raises(InputError, match="is for num_images = 4, not 2"):
        run_script(mitigation_tradeoff, *common, "--images", 2, "--methods", "anisotropy")
    with pytest.raises(InputError, match="unknown method nonsense"):
        run_script(mitigation_tradeoff, *common, "--methods", "nonsense")
    assert not (tmp_path / "out").exists()
