"""Reports, cards and gates of the three kinds of runs."""

import json
import re
from html.parser import HTMLParser

import audited
import pytest
import yaml
from conftest import GOLDEN
from faults import refused
from PIL import Image

import detect_mem
from memorization import cli
from memorization.evaluation.intervals import lower_end, share_interval, upper_end
from memorization.io.files import read_lines
from memorization.report.make import model_card, write_report

ROOT = GOLDEN.parent.parent


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """An audit."""
    place = tmp_path_factory.mktemp("report")
    epochs = audited.save_epochs(place / "lora")
    audited.save_training(place / "set", epochs[-1])
    cli.dispatch(["audit", *audited.FLAGS, "--adapter", str(place / "lora"), "--training", str(place / "set"),
                  "--out", str(place / "out")])  # fmt: skip
    return place / "out"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A detection run with a threshold that flags about half of the prompts."""
    place = tmp_path_factory.mktemp("detection")
    (place / "list.csv").write_text("prompt\n" + "".join(f"{word} kite\n" for word in ("red", "blue", "<b>old</b>")))
    detect_mem.main(["--model", audited.TINY, "--prompts", str(place / "list.csv"), "--detectors", "noise_norm",
                     "--device", "cpu", "--dtype", "float32", "--out", str(place / "out")])  # fmt: skip
    values = sorted(row["noise_norm"][0] for row in read_lines(place / "out" / "scores.jsonl")[0])
    record = json.loads((place / "out" / "run.json").read_text())
    record["sessions"][-1]["thresholds"] = {"noise_norm": values[1]}  # the two highest are flagged
    (place / "out" / "run.json").write_text(json.dumps(record))
    return place / "out"


class Found(HTMLParser):
    """Tags with their attributes."""

    def __init__(self, text):
        super().__init__()
        self.tags = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def of(self, name):
        return [attributes for tag, attributes in self.tags if tag == name]


def test_a_page_is_self_contained_and_says_what_its_pictures_show(out):
    text = write_report(out, False).read_text()
    found = Found(text)
    pictures = found.of("img")
    assert len(pictures) == 2 * len(audited.COPIED)
    assert all(one["src"].startswith("data:image/png;base64,") and one["alt"] for one in pictures)
    links = [one.get("href", one.get("src", "")) for tag, one in found.tags if {"href", "src"} & set(one)]
    assert links and all(link.startswith(("data:", "#")) for link in links)
    assert "url(" not in text and "@import" not in text and "http" not in re.sub(r"http-equiv", "", text)
    (drawing,) = found.of("svg")
    assert drawing["role"] == "img" and "mine: 0.250 (95% 0.032 to 0.651)" in drawing["aria-label"]
    policy = next(one["content"] for one in found.of("meta") if one.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'")
    assert "prefers-color-scheme: dark" in text and "@media print" in text


def test_without_its_script_a_page_says_everything(out):
    text = re.sub(r"<script>.*?</script>", "", write_report(out, False).read_text(), flags=re.DOTALL)
    for caption in audited.CAPTIONS:
        assert caption in text
    assert "Recommended epoch: mine-000002" in text and "copied 2" in text
    for limit in json.loads((out / "audit.json").read_text())["limits"]:
        assert limit["source"].replace("'", "&#39;") in text


def test_hashes_only_leaves_out_pictures_prompts_and_names(out):
    text = write_report(out, True).read_text()
    assert not Found(text).of("img") and ".png" not in text
    assert not any(caption in text for caption in audited.CAPTIONS)
    digest = json.loads((out / "run.json").read_text())["training"][0]["sha256"]
    assert f"sha256:{digest[:16]}" in text
    assert not any(caption in model_card(out, True) for caption in audited.CAPTIONS)


def test_the_same_run_gives_the_same_page(out):
    assert write_report(out, False).read_bytes() == write_report(out, False).read_bytes()


def test_a_card_has_metadata_that_the_hub_reads(out):
    from huggingface_hub import ModelCard

    text = model_card(out, False)
    card = ModelCard(text)
    (share, upper) = card.data.eval_results
    assert card.data.model_name == "mine" and share.metric_value == 0.25
    assert upper.metric_value == pytest.approx(share_interval(2, 8)[2])
    assert yaml.safe_load(text.split("---")[1])["tags"] == ["memorization"]
    assert "| mine " in text and "### What this does not show" in text


def test_a_picture_that_has_gone_leaves_its_words(out, tmp_path):
    import shutil

    shutil.copytree(out, tmp_path / "out")
    shutil.rmtree(tmp_path / "out" / "pictures")
    text = write_report(tmp_path / "out", False).read_text()
    assert text.count("the file is not there any more") == len(audited.COPIED)


def test_a_detection_run_has_a_page_too_and_its_prompts_are_text(run):
    text = write_report(run, False).read_text()
    assert "&lt;b&gt;old&lt;/b&gt; kite" in text and "<b>" not in text
    assert "2 of them are flagged" in text
    assert "kite" not in write_report(run, True).read_text()


def test_a_run_of_mitigation_has_a_page_too(tmp_path):
    rows = [{"id": 0, "prompt": "a", "new_prompt": "b", "nl2_before": [1.0, 2.0], "nl2_after": [3.0, 5.0]}]
    settings = {"model": "m", "method": "rt", "seed": 1, "steps": 2, "num_images": 2}
    (tmp_path / "run.json").write_text(json.dumps({"status": "complete", "seconds": 1.0, "settings": settings}))
    (tmp_path / "mitigations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "images").mkdir()
    for when in ("before", "after"):
        Image.new("RGB", (8, 8)).save(tmp_path / "images" / f"0000-{when}-0.png")
    text = write_report(tmp_path, False).read_text()
    assert "nl2: 1.500 before, 4.000 after" in text and len(Found(text).of("img")) == 2


# ---------------------------------------------------------------- gates


def gate(capsys, *arguments):
    """(exit status, JSON, the line that says why)."""
    status = 0
    try:
        cli.dispatch(["gate", *map(str, arguments)])
    except SystemExit as ended:
        status = ended.code
    said = capsys.readouterr()
    return status, json.loads(said.out), said.err


def test_ends_of_exact_intervals_by_closed_form():
    assert upper_end(0, 299) == pytest.approx(1 - 0.05 ** (1 / 299)) and upper_end(0, 299) <= 0.01 < upper_end(0, 298)
    assert upper_end(5, 5) == 1 and lower_end(0, 5) == 0 and lower_end(5, 5) == pytest.approx(0.05**0.2)
    for hits, trials in ((1, 7), (3, 20)):
        from scipy.stats import binom

        assert binom.cdf(hits, trials, upper_end(hits, trials)) == pytest.approx(0.05)
        assert binom.sf(hits - 1, trials, lower_end(hits, trials)) == pytest.approx(0.05)


def test_a_gate_decides_on_the_upper_end(out, capsys):
    status, said, why = gate(capsys, out)
    assert status == 3 and said["passed"] is False and (said["hits"], said["trials"]) == (2, 8)
    assert why.startswith("stop: 2 of 8 pictures of epoch mine are copies") and why.count("\n") == 1
    status, said, why = gate(capsys, out, "--epoch", "mine-000001")  # no copy, but too few pictures
    assert status == 3 and said["upper"] == pytest.approx(1 - 0.05 ** (1 / 8)) and "299 without a copy" in why
    assert gate(capsys, out, "--epoch", "mine-000001", "--max-copies", "0.32")[0] == 0
    assert gate(capsys, out, "--max-copies", "0.32")[0] == 3


def test_a_gate_counts_families_of_a_detection_run_once(run, capsys):
    status, said, _ = gate(capsys, run)
    assert status == 3 and (said["hits"], said["trials"]) == (2, 3)
    assert gate(capsys, run, "--max-copies", "0.99")[0] == 0
    lines = (run / "scores.jsonl").read_bytes()
    rows = [{**row, "family": "one"} for row in read_lines(run / "scores.jsonl")[0]]
    (run / "scores.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    said = gate(capsys, run)[1]
    (run / "scores.jsonl").write_bytes(lines)
    assert (said["hits"], said["trials"]) == (1, 1)


def test_bad_gates_and_reports_are_one_line(out, run, tmp_path):
    refused(lambda: cli.dispatch(["gate", str(tmp_path)]), "holds no run")
    refused(lambda: cli.dispatch(["report", str(tmp_path)]), "holds no run")
    refused(lambda: cli.dispatch(["gate", str(out), "--epoch", "nine"]), "no epoch nine", "mine-000002")
    refused(lambda: cli.dispatch(["gate", str(out), "--max-copies", "0"]), "0 is no number")
    record = json.loads((run / "run.json").read_text())
    for change, said in ((lambda r: r.update(status="stopped"), "not complete"),
                         (lambda r: r["sessions"][-1].pop("thresholds"), "without a threshold")):  # fmt: skip
        changed = json.loads(json.dumps(record))
        change(changed)
        (tmp_path / "run.json").write_text(json.dumps(changed))
        (tmp_path / "scores.jsonl").write_bytes((run / "scores.jsonl").read_bytes())
        refused(lambda: cli.dispatch(["gate", str(tmp_path)]), said)


def test_the_example_workflow_uses_commands_that_exist():
    steps = yaml.safe_load((ROOT / "examples" / "workflows" / "gate.yml").read_text())["jobs"]["gate"]["steps"]
    commands = re.findall(r"memorization (\w+)", "\n".join(step.get("run", "") for step in steps))
    assert {"audit", "report", "gate"} <= set(commands) and set(commands) <= set(cli.COMMANDS)
