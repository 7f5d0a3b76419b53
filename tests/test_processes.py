"""Several processes make one run: the bytes of one process, whoever is killed on the way."""

import json
import multiprocessing
import os
import shutil
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import GOLDEN, PROMPTS
from faults import refused

from memorization import flags
from memorization.errors import InputError
from memorization.io.files import LineFile, line_of
from memorization.launch import Launch, launched, main_alone
from memorization.models.devices import pick_device
from memorization.runs import processes
from memorization.runs.processes import GatheringStore, Share
from memorization.runs.store import ResultStore

CONTEXT = multiprocessing.get_context("forkserver")  # what takes seconds to import is imported once
CONTEXT.set_forkserver_preload(["torch", "pandas", "matplotlib.pyplot", "local_sd_pipeline", "memorization.api"])
FAST = {"BEAT": 0.1, "SILENCE": 3.0, "LOOK": 0.05, "MEETING": 120.0}
TINY = str(GOLDEN / "tiny-eps")
SEVEN_BATCHES = ("--noises", 2, "--batch-size", 6)  # of 20 prompts


def child(script, place, folder, arguments, stops_at, grace):
    """One process of a launch; at its batch ``stops_at = (number, how)`` it is killed, or meets an error."""
    os.environ.update(zip(("RANK", "WORLD_SIZE", "LOCAL_RANK"), map(str, place), strict=True))
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(folder / f"{place.rank}.{name}", os.O_CREAT | os.O_WRONLY), number)
    for name, seconds in FAST.items():
        setattr(processes, name, seconds)
    flags.GRACE = grace
    from local_sd_pipeline import LocalStableDiffusionPipeline as Pipeline

    plain, batches = Pipeline.trace, []

    def trace(*given, **named):
        batches.append(1)
        (folder / f"{place.rank}.batches").write_text(str(len(batches)))
        if stops_at and len(batches) == stops_at[0]:
            if stops_at[1] == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            raise InputError(stops_at[1])
        return plain(*given, **named)

    Pipeline.trace = trace
    sys.argv = [f"{script}.py", *map(str, arguments)]
    flags.run_script(__import__(script).main)


class Ended:
    """How the processes of a launch ended: statuses, batches, what they printed, and lines that say an error."""

    def __init__(self, folder, started):
        self.statuses = [process.exitcode for process in started]
        said = [[(folder / f"{i}.{name}") for i in range(len(started))] for name in ("out", "err", "batches")]
        self.out, self.err = ([path.read_text() if path.exists() else "" for path in paths] for paths in said[:2])
        self.batches = [int(path.read_text()) if path.exists() else 0 for path in said[2]]
        self.errors = [line for text in self.err for line in text.replace("\r", "\n").splitlines() if "error:" in line]


def launch(folder, count, *arguments, script="detect_mem", stops=None, own=None, ends_all=False, grace=0.1):
    """Start so many processes and wait for their end.

    Args:
        stops: rank -> what stops it.
        own: rank -> further arguments.
        ends_all: as torchrun does, end all where one fails.
        grace: seconds that the main process has to say first what stops all.
    """
    folder.mkdir()
    started = []
    for rank in range(count):
        place, more = Launch(rank, count, rank), (own or {}).get(rank, ())
        target = (script, place, folder, [*arguments, *more], (stops or {}).get(rank), grace)
        started.append(CONTEXT.Process(target=child, args=target))
        started[-1].start()
    while any(process.is_alive() for process in started):
        time.sleep(0.05)
        if ends_all and any(process.exitcode for process in started):
            for process in started:
                process.terminate()
    return Ended(folder, started)


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    """The arguments of a run but for its folder, and the run of a single process."""
    folder = tmp_path_factory.mktemp("scored")
    rows = [{"prompt": f"{text} {i}", "label": i % 2} for i in range(4) for text in PROMPTS]
    (folder / "list.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ("--model", TINY, "--prompts", folder / "list.jsonl", "--device", "cpu", "--dtype", "float32",
                 *SEVEN_BATCHES, "--out")  # fmt: skip
    assert launch(folder / "log", 1, *arguments, folder / "run").statuses == [0]
    return arguments, folder / "run"


@pytest.fixture(scope="module")
def killed(scored, tmp_path_factory):
    """A run of two processes, the second of which was killed at its second batch."""
    folder = tmp_path_factory.mktemp("killed")
    return folder / "run", launch(folder / "log", 2, *scored[0], folder / "run", stops={1: (2, "killed")})


def same(left, right):
    return (left / "scores.jsonl").read_bytes() == (right / "scores.jsonl").read_bytes()


def test_two_processes_write_the_bytes_of_one(scored, tmp_path):
    arguments, alone = scored
    ended = launch(tmp_path / "log", 2, *arguments, tmp_path / "run")
    assert ended.statuses == [0, 0] and ended.batches == [4, 3]
    assert same(tmp_path / "run", alone)
    assert "scores:" in ended.out[0] and "20/20" in ended.err[0] and ended.out[1] == ended.err[1] == ""
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["status"] == "complete" and record["lines"] == 20
    assert [session["processes"] for session in record["sessions"]] == [2]
    assert {path.name for path in (tmp_path / "run").iterdir()} == {path.name for path in alone.iterdir()}

    before = (tmp_path / "run" / "run.json").read_bytes()
    again = launch(tmp_path / "again", 2, *arguments, tmp_path / "run")
    assert again.statuses == [0, 0] and again.batches == [0, 0] and again.out[0] == ended.out[0]
    assert (tmp_path / "run" / "run.json").read_bytes() == before and same(tmp_path / "run", alone)

    wrong = launch(tmp_path / "wrong", 2, *arguments, tmp_path / "run", "--seed", 53)
    assert wrong.statuses == [2, 2] and same(tmp_path / "run", alone)
    (line,) = wrong.errors
    assert "seed: 51 there, 53 asked" in line


def test_a_killed_process_is_missed(killed):
    run, ended = killed
    assert ended.statuses == [2, -signal.SIGKILL] and ended.batches == [4, 2]
    (line,) = ended.errors
    assert line.startswith("error: rank 1 of 2 has given no sign of life for 3 seconds; give the same command again")
    assert (run / "scores.jsonl").read_bytes() == b""


@pytest.mark.parametrize(("count", "batches"), [(1, [2]), (2, [1, 1]), (3, [1, 1, 0])])
def test_any_number_of_processes_goes_on(scored, killed, tmp_path, count, batches):
    arguments, alone = scored
    shutil.copytree(killed[0], tmp_path / "run")
    (part,) = (tmp_path / "run" / "scores.parts").glob("0001-of-0002-*.jsonl")
    assert [json.loads(line)["id"] for line in part.read_bytes().splitlines()] == [3, 4, 5]
    part.write_bytes(part.read_bytes() + b'{"id": 9, "pro')
    ended = launch(tmp_path / "log", count, *arguments, tmp_path / "run")
    assert ended.statuses == [0] * count and ended.batches == batches
    assert same(tmp_path / "run", alone) and not (tmp_path / "run" / "scores.parts").exists()


def test_the_main_process_is_missed(scored, tmp_path):
    arguments, alone = scored
    ended = launch(tmp_path / "log", 2, *arguments, tmp_path / "run", stops={0: (2, "killed")})
    assert ended.statuses == [-signal.SIGKILL, 2] and ended.batches == [2, 3]
    (line,) = ended.errors
    assert line.startswith("error: rank 1 of 2: rank 0 of 2 has given no sign of life")
    again = launch(tmp_path / "again", 1, *arguments, tmp_path / "run")
    assert again.statuses == [0] and again.batches == [3] and same(tmp_path / "run", alone)


def test_an_error_of_one_is_said_once(scored, tmp_path):
    arguments, _ = scored
    ended = launch(tmp_path / "log", 2, *arguments, tmp_path / "run", stops={1: (1, "no number")}, ends_all=True,
                   grace=60)  # fmt: skip
    assert ended.statuses == [2, 1] and ended.errors == ["error: rank 1 of 2: no number"]


def test_an_error_of_all_is_said_once(scored, tmp_path):
    ended = launch(tmp_path / "log", 2, *scored[0], tmp_path / "run", "--seed", "x", ends_all=True, grace=60)
    assert ended.statuses == [2, 1] and len(ended.errors) == 1 and "x is no whole number" in ended.errors[0]


def test_help_is_printed_once(tmp_path):
    ended = launch(tmp_path / "log", 2, "--help")
    assert ended.statuses == [0, 0] and "--noises" in ended.out[0] and ended.out[1] == ended.err[1] == ""


def test_an_error_of_one_before_it_has_come(scored, tmp_path):
    ended = launch(tmp_path / "log", 2, *scored[0], tmp_path / "run", own={1: ("--device", "warp")}, ends_all=True)
    assert ended.statuses == [1, 2] and len(ended.errors) == 1
    assert ended.errors[0].startswith("error: rank 1 of 2: device 'warp'")


def test_processes_of_other_settings_are_refused(scored, tmp_path):
    ended = launch(tmp_path / "log", 2, *scored[0], tmp_path / "run", own={1: ("--seed", 52)})
    assert ended.statuses == [2, 2] and ended.batches == [0, 0]
    (line,) = ended.errors
    assert "rank 1 of 2 has other settings than the main process (seed: 52 there, 51 asked)" in line


def test_mitigation_by_two_processes(tmp_path):
    (tmp_path / "list.txt").write_text("".join(f"{text} kite\n" for text in PROMPTS))
    arguments = ("--model", TINY, "--prompts", tmp_path / "list.txt", "--all", "--calibration", "none", "--method",
                 "rt", "--noises", 1, "--steps", 3, "--batch-size", 2, "--clip", "none", "--device", "cpu", "--dtype",
                 "float32", "--out")  # fmt: skip
    found = []
    for count in (1, 2):
        out = tmp_path / f"by-{count}"
        ended = launch(tmp_path / f"log-{count}", count, *arguments, out, script="mitigate_mem")
        assert ended.statuses == [0] * count and ended.out[1:] == [""] * (count - 1)
        lines = [json.loads(line) for line in (out / "mitigations.jsonl").read_text().splitlines()]
        assert [line["id"] for line in lines] == [0, 1, 2, 3, 4]
        files = {path.relative_to(out): path.read_bytes() for path in (out / "images").iterdir()}
        found.append(([{k: v for k, v in line.items() if "seconds" not in k} for line in lines], files))
    assert len(found[0][1]) == 10 and found[0] == found[1]


# ---------------------------------------------------------------- parts, in one process
def rows(*numbers):
    return [{"id": i, "prompt": f"é {i}"} for i in numbers]


@pytest.fixture
def parted(tmp_path):
    """A run of fourteen lines whose first five are whole; parts hold most others, and some twice."""
    (tmp_path / "run.json").write_text(json.dumps({"status": "running", "seconds": 1.0, "settings": {"seed": 1}}))
    (tmp_path / "scores.jsonl").write_bytes(b"".join(map(line_of, rows(*range(5)))) + b'{"id": 5, "pro')
    (tmp_path / "scores.parts").mkdir()
    one, other = (tmp_path / "scores.parts" / f"{name}.jsonl" for name in ("a", "b"))
    one.write_bytes(b"".join(map(line_of, rows(2, 3, 4, 5, 6, 9, 10, 11))) + b'{"id": 12')
    other.write_bytes(b"".join(map(line_of, rows(6, 7, 8, 9))))
    return tmp_path


def test_what_parts_hold_is_taken(parted):
    with GatheringStore(parted, {"seed": 1}, {}) as store:
        assert store.lacks(14) and not store.anew
        store.start()
        for numbers in store.batches(14, 4):
            assert numbers == range(12, 14) and store.done == 12
            store.add(rows(*numbers))
    assert store.rows == rows(*range(14)) and not (parted / "scores.parts").exists()


def test_parts_are_forgotten_with_the_run(parted):
    with GatheringStore(parted, {"seed": 2}, {}, overwrite=True) as store:
        assert store.anew and list(store.batches(3, 2)) == [range(2), range(2, 3)]


def test_damaged_parts(parted):
    part = parted / "scores.parts" / "b.jsonl"
    for damage in (b"{broken}\n", b'{"id": "6"}\n'):
        part.write_bytes(damage + part.read_bytes())
        with GatheringStore(parted, {"seed": 1}, {}) as store:
            refused(lambda store=store: list(store.batches(14, 4)), "b.jsonl", "damaged")


def test_parts_without_their_settings(parted):
    (parted / "run.json").unlink()
    (parted / "scores.jsonl").unlink()
    refused(lambda: GatheringStore(parted, {"seed": 1}, {}), "has no run.json")


def test_parts_that_somebody_writes_to(parted):
    with LineFile(parted / "scores.parts" / "a.jsonl", ""):
        refused(lambda: GatheringStore(parted, {"seed": 1}, {}), "another launch is still writing")


def of_launch(monkeypatch, *values):
    for name, value in zip(("RANK", "WORLD_SIZE", "LOCAL_RANK"), values, strict=True):
        monkeypatch.setenv(name, value) if value is not None else monkeypatch.delenv(name, raising=False)


def test_a_share_is_every_kth_batch_that_is_missing(tmp_path, monkeypatch):
    of_launch(monkeypatch, "1", "2", "1")
    share = Share(tmp_path / "a.jsonl", [[2, 3], [5, 19]], 4, 19)  # batches 0, 1, 2, 3, 4
    assert list(share.left(4)) == [range(4, 8), range(12, 16)]
    share.add(rows(4, 5, 6, 7))  # 4 is there already
    assert share.made == 3 and list(share.left(4)) == [range(12, 16)]
    share.add(rows(12, 13))
    assert list(share.left(2)) == [range(14, 16)]  # memory has halved the batch
    share.close()
    assert [json.loads(line)["id"] for line in (tmp_path / "a.jsonl").open()] == [5, 6, 7, 12, 13]
    of_launch(monkeypatch, "0", "3", "0")
    share = Share(tmp_path / "b.jsonl", [[2, 3], [5, 19]], 4, 19)
    assert list(share.left(4)) == [range(4), range(12, 16)]
    share.close()


def test_a_process_listens_to_its_own_launch_alone(tmp_path, monkeypatch):
    of_launch(monkeypatch, "1", "2", "1")
    monkeypatch.setattr(processes, "LOOK", 0.01)
    parts = tmp_path / "scores.parts"
    processes.Voice(parts / "main.json", others={"1": "stale"}, whole=True).end(None)  # of an earlier launch
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(processes.HelpingStore, tmp_path, {"seed": 1}, "scores.jsonl")
        main = processes.Others(parts)
        main.place = Launch(0, 2, 0)
        main.meet({"seed": 1})
        store = coming.result(timeout=10)
    main.voice.say(missing=[[0, 4]], size=2)
    with store:
        assert store.lacks(4)
        main.voice.end(None)
        processes.Voice(parts / "main.json", missing=[[0, 4]], size=2, whole=True).end(None)
        refused(lambda: store.lacks(4), "another launch goes on")


# ---------------------------------------------------------------- places and devices
@pytest.mark.parametrize(
    ("values", "place"),
    [
        ((None, None, None), Launch(0, 1, 0)),
        (("0", "1", "0"), Launch(0, 1, 0)),
        (("3", None, "3"), Launch(0, 1, 0)),
        (("5", "8", "1"), Launch(5, 8, 1)),
        (("8", "8", "0"), None),
        (("-1", "8", "0"), None),
        (("1", "8", None), None),
        ((None, "8", "0"), None),
        (("1", "many", "0"), None),
    ],
)
def test_places(monkeypatch, values, place):
    of_launch(monkeypatch, *values)
    if place is None:
        refused(launched, f"RANK={values[0]}, WORLD_SIZE={values[1]}, LOCAL_RANK={values[2]}")
    else:
        assert launched() == place


@pytest.mark.parametrize(
    ("local", "devices", "expected"), [("1", 2, 1), ("0", 2, 0), ("3", 1, 0), ("2", 2, "2 CUDA devices")]
)
def test_each_process_has_its_own_device(monkeypatch, local, devices, expected):
    of_launch(monkeypatch, local, "4", local)
    current = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: devices)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.setattr(torch, "empty", lambda *_, **__: None)
    if isinstance(expected, str):
        refused(lambda: pick_device("auto"), f"LOCAL_RANK={local}", expected)
    else:
        assert pick_device("auto") == pick_device("cuda") == torch.device("cuda", expected)
        assert current == [torch.device("cuda", expected)] * 2


def test_what_is_not_shared_is_refused(tmp_path, monkeypatch):
    of_launch(monkeypatch, "0", "2", "0")
    refused(lambda: ResultStore(tmp_path / "run", {}, {}), "start it as one")
    main_alone()
    with ResultStore(tmp_path / "run", {}, {}):
        pass
    of_launch(monkeypatch, "1", "2", "1")
    with pytest.raises(SystemExit) as ended:
        main_alone()
    assert not ended.value.code
