"""Reports, cards and gates of the three kinds of runs."""

import hashlib
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import audited
import numpy as np
import pytest
import yaml
from conftest import GOLDEN
from faults import refused
from PIL import Image

import detect_mem
from memorization import cli
from memorization.evaluation.intervals import lower_end, upper_end, upper_end_of_difference
from memorization.io.files import read_lines
from memorization.report.make import model_card, write_report

ROOT = GOLDEN.parent.parent


@pytest.fixture(scope="module")
def out(audited_place, tmp_path_factory):
    """An audit."""
    return shutil.copytree(audited_place / "out", tmp_path_factory.mktemp("report") / "out")


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """An audit of more pictures, of which the epoch "late" copies one at three of eight noises; without pictures."""
    base = np.full((20, 8), 2.0)
    early, late = base.copy(), base.copy()
    early[3, 0] = late[3, :3] = 0
    folder = tmp_path_factory.mktemp("many") / "out"
    audited.save_run(folder, base, {"early": early, "late": late})
    return folder


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
    assert "Recommended epoch: mine-000002" in text and "copied 0, at risk 2" in text
    for limit in json.loads((out / "audit.json").read_text())["limits"]:
        assert limit["source"].replace("'", "&#39;") in text


def test_hashes_only_leaves_out_pictures_prompts_and_names(out, many, tmp_path):
    record, found = (json.loads((out / name).read_text()) for name in ("run.json", "audit.json"))
    record["settings"]["model"] = "/home/somebody/client"
    shutil.copytree(out, tmp_path / "out")
    (tmp_path / "out" / "run.json").write_text(json.dumps(record))
    page, card = write_report(tmp_path / "out", True).read_text(), model_card(tmp_path / "out", True)
    assert not Found(page).of("img")
    secret = ["somebody", "client", ".png", "zwx", "mine", str(tmp_path)]
    for text in (page, card, write_report(many, True).read_text(), model_card(many, True)):
        assert not [word for word in [*secret, "early", "late", "caption 3"] if word in text.replace("template", "")]
    assert f"sha256:{record['training'][0]['sha256'][:16]}" in page
    assert found["recommended"] == record["epochs"][1]["name"]  # the second, by its number and hash
    digest = hashlib.sha256(record["epochs"][1]["revision"].encode()).hexdigest()[:16]
    assert f"Recommended epoch: 2 (sha256:{digest})" in page
    assert "somebody" in write_report(tmp_path / "out", False).read_text()


def test_a_page_says_when_a_picture_first_counts_as_copied(many):
    text = write_report(many, False).read_text()
    assert "The first epoch at which a training picture counts as copied is late; single copies" in text
    assert "copied 1, at risk" in text and "Recommended epoch: early" in text and "first copied at epoch" in text


def test_a_run_that_is_not_complete_has_no_page_and_no_gate(many, tmp_path):
    """Stopped; begun anew and killed; or killed when a new run removed what was found."""
    shutil.copytree(many, tmp_path / "out")
    record = json.loads((many / "run.json").read_text())

    def refuses():
        for command in ("report", "gate"):
            refused(lambda: cli.dispatch([command, str(tmp_path / "out")]), "this run is not complete")  # noqa: B023

    (tmp_path / "out" / "run.json").write_text(json.dumps({**record, "status": "running"}))
    refuses()
    (tmp_path / "out" / "run.json").write_text(json.dumps(record))
    (tmp_path / "out" / "scores.jsonl").write_text("")
    refuses()
    shutil.copy(many / "scores.jsonl", tmp_path / "out" / "scores.jsonl")
    cli.dispatch(["report", str(tmp_path / "out")])
    (tmp_path / "out" / "audit.json").unlink()
    refuses()


SORTED = (  # cells of a column, ascending
    ["-2", "1e-05", ".25", "0.5", "10", ""], ["9%", "12%", "100%"], ["0.125 [0, 1]", "0.25 [0.03, 0.65]", "0.3 [0, 1]"],
    ["9 of 9", "10 of 20", ""], ["1girl, a", "1girl, b", ""], ["mine", "mine-9", "mine-10"],
)  # fmt: skip


@pytest.mark.skipif(not shutil.which("node"), reason="needs node")
def test_columns_of_numbers_are_sorted_as_numbers_and_empty_cells_last():
    page = (ROOT / "memorization" / "report" / "page.html").read_text()
    functions = page[page.index("const text =") : page.index("for (const head of")]
    shuffled = [cells[1:] + cells[:1] for cells in SORTED]
    said = f"""{functions}
    const rows = cells => cells.map(cell => ({{ cells: [{{ textContent: cell }}] }}));
    const both = cells => [true, false].map(up => sorted(rows(cells), 0, up).map(row => text(row, 0)));
    console.log(JSON.stringify({json.dumps(shuffled)}.map(both)));"""
    made = subprocess.run(["node", "-e", said], capture_output=True, text=True, check=True)
    down = [[cell for cell in reversed(cells) if cell] + [""] * cells.count("") for cells in SORTED]
    assert json.loads(made.stdout) == [[up, other] for up, other in zip(SORTED, down, strict=True)]


def test_the_same_run_gives_the_same_page(out):
    assert write_report(out, False).read_bytes() == write_report(out, False).read_bytes()


def test_a_card_has_metadata_that_the_hub_reads(out):
    from huggingface_hub import ModelCard

    text = model_card(out, False)
    card = ModelCard(text)
    values = {one.metric_name: one.metric_value for one in card.data.eval_results}
    assert card.data.model_name == "mine" and list(values.values())[:3] == [8, 2, 0]
    assert values["share of copies less that of the base, upper end of 95%"] == pytest.approx(upper_end(2, 8))
    assert values["training pictures that count as copied"] == 0
    assert yaml.safe_load(text.split("---")[1])["tags"] == ["memorization"]
    assert "| mine " in text and "### What this does not show" in text


def test_a_picture_that_has_gone_leaves_its_words(out, tmp_path):
    shutil.copytree(out, tmp_path / "out")
    shutil.rmtree(tmp_path / "out" / "pictures")
    text = write_report(tmp_path / "out", False).read_text()
    assert text.count("the file is not there any more") == len(audited.COPIED)


def test_a_detection_run_has_a_page_too_and_its_prompts_are_text(run):
    text = write_report(run, False).read_text()
    assert "&lt;b&gt;old&lt;/b&gt; kite" in text and "<b>" not in text
    assert "2 of them are flagged" in text
    for text in (write_report(run, True).read_text(), model_card(run, True)):
        assert "kite" not in text and audited.TINY not in text and "list.csv" not in text


def test_a_run_of_mitigation_has_a_page_too(tmp_path):
    rows = [{"id": 0, "prompt": "a", "new_prompt": "b", "nl2_before": [1.0, 2.0], "nl2_after": [3.0, 5.0]}]
    settings = {"model": "/secret/m", "method": "rt", "seed": 1, "steps": 2, "num_images": 2}
    (tmp_path / "run.json").write_text(json.dumps({"status": "complete", "seconds": 1.0, "settings": settings}))
    (tmp_path / "mitigations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "images").mkdir()
    for when in ("before", "after"):
        Image.new("RGB", (8, 8)).save(tmp_path / "images" / f"0000-{when}-0.png")
    text = write_report(tmp_path, False).read_text()
    assert "nl2: 1.500 before, 4.000 after" in text and len(Found(text).of("img")) == 2
    assert "secret" in text and "secret" not in write_report(tmp_path, True).read_text() + model_card(tmp_path, True)


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
    assert status == 3 and said["passed"] is False and (said["hits"], said["lost"], said["trials"]) == (2, 0, 8)
    assert why.startswith("stop: 2 of 8 pictures of epoch mine are copies") and why.count("\n") == 1
    assert why.endswith("; more of them would not help\n")
    status, said, why = gate(capsys, out, "--epoch", "mine-000001")  # no copy, but too few pictures
    assert status == 3 and said["upper"] == pytest.approx(1 - 0.05 ** (1 / 8)) and "; 299 would suffice" in why
    assert gate(capsys, out, "--epoch", "mine-000001", "--max-copies", "0.32")[0] == 0
    assert gate(capsys, out, "--max-copies", "0.32")[0] == 3


def failures(trials, limit, lost):
    """How often a fine-tune passes that adds just what is allowed, to a share that is ``lost``, counted out."""
    from scipy.stats import binom

    downs, ups = (np.arange(binom.ppf(1 - 1e-6, trials, share) + 1) for share in (lost, limit + lost))
    likely = binom.pmf(downs, trials, lost)[:, None]
    likely = likely * binom.pmf(ups, trials - downs[:, None], (limit + lost) / (1 - lost))
    passed = [[upper_end_of_difference(up, down, trials) <= limit for up in ups] for down in downs]
    return likely[np.array(passed)].sum()


@pytest.mark.parametrize("trials", [299, 600, 1000])
def test_at_the_limit_a_gate_passes_in_one_of_twenty_at_most(trials):
    for lost in (0, 0.001, 0.003, 0.01):
        assert 0.01 < failures(trials, 0.01, lost) <= 0.05
    assert upper_end_of_difference(3, 0, trials) == pytest.approx(upper_end(3, trials))


def test_at_the_limit_a_gate_holds_where_the_limit_comes_from_the_base():
    """Ten of 1000 of the base lie beyond it by construction; the fine-tune adds 1% to what lies there."""
    random, times = np.random.default_rng(0), 2000
    beyond = random.beta(11, 990, times)
    hit = beyond + 0.01
    gained, lost = random.binomial(990, hit), random.binomial(10, 1 - hit)
    passed = [upper_end_of_difference(*pair, 1000) <= 0.01 for pair in zip(gained, lost, strict=True)]
    assert 0.01 < np.mean(passed) < 0.06


def test_pictures_of_the_training_pictures_kind_pass_with_enough_of_them(tmp_path, capsys):
    """A base that knows nothing of the concept, and a fine-tune that draws it and copies nothing."""
    random = np.random.default_rng(0)
    training = random.standard_normal((20, 16))
    apart = np.linalg.norm(training[:, None] - training[None], axis=2)
    new = np.linalg.norm(random.standard_normal((20, 50, 1, 16)) - training, axis=3).min(2)
    audited.save_run(tmp_path / "out", np.full((20, 50), 9.0), {"tuned": new}, apart)
    assert (new < apart[apart > 0].min()).mean() > 0.01  # than the nearest of the training pictures' distances
    status, said, why = gate(capsys, tmp_path / "out")
    assert status == 0 and said["hits"] < 5 and said["copied"] == [], why


def test_a_gate_stops_where_a_training_picture_counts_as_copied(tmp_path, capsys):
    """One of 200, at each of 20 noises: half a percent of all pictures."""
    base = np.full((200, 20), 2.0)
    copying = base.copy()
    copying[7] = 0
    audited.save_run(tmp_path / "out", base, {"copying": copying})
    status, said, why = gate(capsys, tmp_path / "out")
    assert status == 3 and said["upper"] < 0.01 and said["copied"] == ["7.png"] and said["needed"] is None
    assert why.startswith("stop: 20 of 4000") and "; training pictures that count as copied: 1, and none may" in why
    assert "not above the 0.01" in why and why.endswith("; more of them would not help\n")


def test_a_gate_says_what_it_does_not_count_and_whom_the_base_draws(many, tmp_path, capsys):
    shutil.copytree(many, tmp_path / "out")
    found = json.loads((many / "audit.json").read_text())
    for one, copies in zip(found["epochs"], (1, 0, 4), strict=True):
        one["copies"]["paraphrase"] = {**one["copies"]["caption"], "copies": copies}
    found["known"] = [{"training": ["3.png"], "limit": 0.1, "drawn": 9}]
    (tmp_path / "out" / "audit.json").write_text(json.dumps(found))
    _, said, why = gate(capsys, tmp_path / "out")
    assert said["known"] == ["3.png"] and "as the base draws them itself: 1" in why
    assert "not counted: 4 of 160 pictures of paraphrase prompts are copies (1 of the base's)" in why
    assert "not counted" not in gate(capsys, tmp_path / "out", "--epoch", "early")[2]
    page = write_report(tmp_path / "out", True).read_text()
    assert "it draws it itself (9 times)" in page and "3.png" not in page


def distances(seed, noises):
    return np.random.default_rng(seed).random((50, noises))


def test_a_fine_tune_that_is_its_base_passes_by_default_with_enough_pictures(tmp_path, capsys):
    """Ten of 1000 of its pictures lie beyond the limit, as of the base's: they are the base's own."""
    base = distances(0, 20)
    found = audited.save_run(tmp_path / "many", base, {"same": base})
    assert [one["copies"]["caption"]["copies"] for one in found["epochs"]] == [10, 10]
    assert gate(capsys, tmp_path / "many")[0] == 0
    audited.save_run(tmp_path / "few", base[:, :5], {"same": base[:, :5]})
    status, said, _ = gate(capsys, tmp_path / "few")
    assert status == 3 and said["needed"] == 299 > said["trials"] == 250


def test_a_fine_tune_that_draws_others_and_no_copies_passes_with_enough_pictures(tmp_path, capsys):
    """By chance as many of its pictures lie beyond the limit as of the base's, but others; 2% of copies do not pass."""
    for seed in range(4):
        base, other = distances(seed, 100), distances(100 + seed, 100)
        copying = other.copy()
        copying.flat[::50] = -1
        audited.save_run(tmp_path / str(seed), base, {"copying": copying, "other": other})
        status, said, why = gate(capsys, tmp_path / str(seed))
        assert status == 0 and said["hits"] > 25 and said["lost"] > 25, why
        assert gate(capsys, tmp_path / str(seed), "--epoch", "copying")[0] == 3
    audited.save_run(tmp_path / "few", distances(0, 8), {"other": distances(100, 8)})
    status, said, _ = gate(capsys, tmp_path / "few")
    assert status == 3 and 400 < said["needed"] < 1000


def test_an_audit_of_another_version_is_one_line(many, tmp_path):
    shutil.copytree(many, tmp_path / "out")
    for content in ({}, {"epochs": []}, {"epochs": [1, {"name": "early"}]}):
        (tmp_path / "out" / "audit.json").write_text(json.dumps(content))
        refused(lambda: cli.dispatch(["gate", str(tmp_path / "out")]), "damaged, or of another version")


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
