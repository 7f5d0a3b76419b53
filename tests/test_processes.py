"""Several processes make one run: the bytes of one process, whoever is killed on the way."""

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from conftest import GOLDEN, PROMPTS
from faults import refused

from memorization import cli, flags
from memorization.errors import AlreadySaid, InputError
from memorization.io.files import LineFile, line_of
from memorization.launch import Launch, check_launch, launched, main_alone
from memorization.models.devices import pick_device
from memorization.runs import signs
from memorization.runs.processes import HelpingStore, MainStore, digits, open_store
from memorization.runs.signs import Peer, Sign
from memorization.runs.store import ResultStore

CONTEXT = multiprocessing.get_context("forkserver")  # what takes seconds to import is imported once
CONTEXT.set_forkserver_preload(["torch", "pandas", "matplotlib.pyplot", "local_sd_pipeline", "memorization.api"])
FAST = {"BEAT": 0.1, "LOOK": 0.05}
TINY = str(GOLDEN / "tiny-eps")
SEVEN_BATCHES = ("--noises", 2, "--batch-size", 6)  # of 20 prompts


def child(script, place, folder, arguments, stops_at, grace, silence):
    """One process of a launch; at its batch ``stops_at = (number, how)`` it is killed, or meets an error."""
    os.environ.update(zip(("RANK", "WORLD_SIZE", "LOCAL_RANK"), map(str, place), strict=True))
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(folder / f"{place.rank}.{name}", os.O_CREAT | os.O_WRONLY), number)
    for name, seconds in {**FAST, "SILENCE": silence}.items():
        setattr(signs, name, seconds)
    flags.GRACE = grace
    from local_sd_pipeline import LocalStableDiffusionPipeline as Pipeline

    plain, batches = Pipeline.trace, []

    def trace(*given, **named):
        batches.append(1)
        (folder / f"{place.rank}.batches").write_text(str(len(batches)))
        if stops_at and len(batches) == stops_at[0]:
            if stops_at[1] == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            raise stops_at[1]
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
        stops: rank -> its batch, and what stops it there: an error, or "killed".
        own: rank -> further arguments.
        ends_all: as torchrun does, end all where one fails.
        grace: seconds that the main process has to say first what stops all.
    """
    folder.mkdir()
    # Only where one is killed has the others' silence to be short: under load a living one may say nothing for long.
    silence = 3.0 if any(how == "killed" for _, how in (stops or {}).values()) else 180.0
    started = []
    for rank in range(count):
        place, more = Launch(rank, count, rank), (own or {}).get(rank, ())
        target = (script, place, folder, [*arguments, *more], (stops or {}).get(rank), grace, silence)
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
    ended = launch(tmp_path / "log", 2, *arguments, tmp_path / "run", stops={1: (1, InputError("no number"))},
                   ends_all=True, grace=60)  # fmt: skip
    assert ended.statuses == [2, 1] and ended.errors == ["error: rank 1 of 2: no number"]


def test_an_error_of_all_is_said_once(scored, tmp_path):
    ended = launch(tmp_path / "log", 2, *scored[0], tmp_path / "run", "--seed", "x", ends_all=True, grace=60)
    assert ended.statuses == [2, 1] and len(ended.errors) == 1 and "x is no whole number" in ended.errors[0]


def test_a_bug_of_one_is_said_once_and_its_traceback_is_kept(scored, tmp_path):
    stops = {1: (1, ValueError("no such thing"))}
    ended = launch(tmp_path / "log", 2, *scored[0], tmp_path / "run", stops=stops, ends_all=True, grace=60)
    (line,) = ended.errors
    assert ended.statuses == [2, 1] and line.startswith("error: rank 1 of 2: ValueError no such thing (more in ")
    kept = json.loads(Path(line.split("more in ")[1].rstrip(")")).read_text())
    assert "raise stops_at[1]\n" in "".join(kept["traceback"])


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
    one, other = (tmp_path / "scores.parts" / f"{name}-{digits({'seed': 1})}.jsonl" for name in ("a", "b"))
    one.write_bytes(b"".join(map(line_of, rows(2, 3, 4, 5, 6, 9, 10, 11))) + b'{"id": 12')
    other.write_bytes(b"".join(map(line_of, rows(6, 7, 8, 9))))
    return tmp_path


def test_what_parts_hold_is_taken(parted):
    """Also by one process; what it makes meanwhile goes to a part of its own, which is taken in turn."""
    for expected in (range(12, 13), range(13, 14)):
        with open_store(parted, {"seed": 1}, {}) as store:
            assert store.lacks(14) and not store.anew
            store.start()
            batches = store.batches(14, 1)
            assert next(batches) == expected
            store.add(rows(*expected))
            if expected.stop == 14:
                assert not list(batches)
    assert store.rows == rows(*range(14)) and not (parted / "scores.parts").exists()


def test_parts_are_forgotten_with_the_run(parted):
    with open_store(parted, {"seed": 2}, {}, overwrite=True) as store:
        assert store.anew and list(store.batches(3, 2)) == [range(2), range(2, 3)]


def test_damaged_parts(parted):
    (part,) = (parted / "scores.parts").glob("b-*.jsonl")
    for damage in (b"{broken}\n", b'{"id": "6"}\n'):
        part.write_bytes(damage + part.read_bytes())
        with open_store(parted, {"seed": 1}, {}) as store:
            refused(lambda store=store: list(store.batches(14, 4)), part.name, "damaged")


@pytest.mark.parametrize(("seed", "first"), [(1, [range(4)]), (2, [range(4), range(4, 8)])])
def test_parts_are_taken_for_their_settings_alone(parted, seed, first):
    (parted / "run.json").unlink()
    (parted / "scores.jsonl").unlink()
    with open_store(parted, {"seed": seed}, {}) as store:
        batches = store.batches(8, 4)
        assert store.anew == (seed == 2)
        for expected in first:
            assert next(batches) == expected
            store.add(rows(*expected))
        assert not list(batches) and store.rows == rows(*range(8))


def test_parts_that_somebody_writes_to(parted):
    with LineFile(parted / "scores.parts" / "a-of-other-settings.jsonl", ""):
        refused(lambda: open_store(parted, {"seed": 1}, {}), "another launch is still writing")


def of_launch(monkeypatch, *values):
    for name, value in zip(("RANK", "WORLD_SIZE", "LOCAL_RANK"), values, strict=True):
        monkeypatch.setenv(name, value) if value is not None else monkeypatch.delenv(name, raising=False)


# ---------------------------------------------------------------- two stores, in one process
@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(signs, "LOOK", 0.01)
    monkeypatch.setattr(signs, "BEAT", 0.01)
    monkeypatch.setattr(signs, "MEETING", 30.0)


def main_store(folder, count):
    return MainStore(Launch(0, count, 0), folder, {"seed": 1}, {}, False, "scores.jsonl")


def both(folder, count=2):
    """The stores of a launch."""
    with ThreadPoolExecutor(count) as pool:
        coming = [pool.submit(HelpingStore, Launch(rank, count, rank), folder, {"seed": 1}, "scores.jsonl")
                  for rank in range(1, count)]  # fmt: skip
        return main_store(folder, count), *(one.result(timeout=60) for one in coming)


def made(store, count, size, pieces=()):
    """Make the batches of a store; it meets the end of its memory after the first, where there are ``pieces``."""
    found = []
    for at_once in (size, *pieces):
        for numbers in store.batches(count, at_once):
            if found and pieces and at_once == size:
                break
            found.append(numbers)
            store.add(rows(*numbers))
    return found


def test_a_share_is_every_kth_batch_that_is_missing(parted, impatient):
    """Lines from 12 on are missing."""
    main, helper = both(parted)
    with ThreadPoolExecutor(1) as pool, main, helper:
        assert main.lacks(27) and not main.anew and not helper.anew
        main.start()
        making = pool.submit(made, main, 27, 4)
        assert helper.lacks(27) and made(helper, 27, 4, pieces=[2]) == [range(16, 20), range(24, 26), range(26, 27)]
        assert making.result(timeout=60) == [range(12, 16), range(20, 24)]
    assert main.rows == helper.rows == rows(*range(27)) and not (parted / "scores.parts").exists()


def test_one_that_stopped_is_missed_before_the_own_share_is_done(tmp_path, impatient):
    for stopped in (0, 1):
        stores = both(tmp_path / str(stopped))
        with ThreadPoolExecutor(1) as pool:
            assert stores[0].lacks(9)
            own = [store.batches(9, 1) for store in stores]
            first = [next(own[0]), pool.submit(stores[1].lacks, 9).result(timeout=60) and next(own[1])]
            assert first == [range(1), range(1, 2)]
            stores[stopped].__exit__(InputError, InputError("no number"), None)
            time.sleep(0.02)
            if stopped:
                refused(lambda own=own: next(own[0]), "rank 1 of 2: no number")
            else:
                with pytest.raises(AlreadySaid, match="no number"):
                    next(own[1])
            stores[1 - stopped].__exit__(InputError, InputError("it too"), None)


@pytest.mark.parametrize("lines", [4, 3])
def test_a_main_process_that_has_gone_left_all_lines(tmp_path, impatient, monkeypatch, lines):
    """It may have gone before the other one has heard that it was seen."""
    monkeypatch.setattr(signs, "SILENCE", 0.2)
    parts = tmp_path / "scores.parts"
    main = Sign(parts / "main.json", token="main")
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(HelpingStore, Launch(1, 2, 1), tmp_path, {}, "scores.jsonl")
        while not (parts / "0001-of-0002-main.json").exists():
            time.sleep(0.01)
        (tmp_path / "scores.jsonl").write_bytes(b"".join(map(line_of, rows(*range(lines)))))
        main.end(None)
        with coming.result(timeout=60) as store:
            if lines == 4:
                assert not store.lacks(4)
            else:
                refused(lambda: store.lacks(4), "rank 0 of 2 has given no sign of life")


@pytest.mark.parametrize("alive", [False, True])
def test_a_process_listens_to_its_own_launch_alone(tmp_path, impatient, alive):
    """Neither to a main process that was killed while it waited for its own, nor to one that has met them."""
    parts = tmp_path / "scores.parts"
    before = Sign(parts / "main.json", token="before", **({"met": True} if alive else {}))
    if not alive:
        before.end(None)
        before.say()
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(HelpingStore, Launch(1, 2, 1), tmp_path, {"seed": 1}, "scores.jsonl")
        time.sleep(0.2)
        assert not coming.done()
        before.end(InputError("of before"))
        main = main_store(tmp_path, 2)
        helper = coming.result(timeout=60)
    assert main.lacks(4)
    first = next(main.batches(4, 4))
    with helper:
        assert helper.lacks(4) and first == range(4)
        main.__exit__(InputError, InputError(""), None)
        Sign(parts / "main.json", token="of another", starts=[0], size=4).end(InputError(""))
        refused(lambda: helper.lacks(4), "another launch goes on")


def test_a_last_sign_that_is_seen_late_is_none_of_life(tmp_path, monkeypatch):
    """Network file systems may show an old time of a file until it is opened."""
    path, early, plain = tmp_path / "main.json", [Path(__file__).stat()], Path.stat
    path.write_text('{"token": "before"}')
    monkeypatch.setattr(Path, "stat", lambda self, **how: early.pop() if early else plain(self, **how))
    main = Peer(path, Launch(1, 2, 1), 0)
    assert main.word() == {}
    os.utime(path, (1, 1))
    assert main.word() == {"token": "before"}


def test_one_that_is_done_may_end_before_the_others(tmp_path):
    peer, sign = Peer(tmp_path / "it.json", Launch(0, 3, 0), 1), Sign(tmp_path / "it.json", token="this")
    sign.say(done=True)
    sign.end(InputError("terminated"))
    assert peer.look("this")["done"]


def test_one_that_does_not_come_is_named(tmp_path, impatient, monkeypatch):
    monkeypatch.setattr(signs, "MEETING", 0.1)
    refused(lambda: main_store(tmp_path, 3), "rank 1 of 3 has not come within 0.1 seconds",
            "in one process of a launch alone, unset WORLD_SIZE")  # fmt: skip


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
def test_places(tmp_path, monkeypatch, values, place):
    of_launch(monkeypatch, *values)
    if place is None:
        refused(check_launch, f"RANK={values[0]}, WORLD_SIZE={values[1]}, LOCAL_RANK={values[2]}")
        refused(lambda: open_store(tmp_path, {}, {}), "no place among processes")
        assert launched() == Launch()
    else:
        assert launched() == check_launch() == place


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


@pytest.mark.parametrize(
    ("values", "command", "status", "said"),
    [
        (("0", "2", "0"), "models", 0, "testbed-eps"),
        (("1", "2", "1"), "models --nonsense", 0, ""),  # the main process says it
        (("1", "2", "1"), "study sequential --nonsense", 0, ""),
        (("1", "2", None), "models", 0, "testbed-eps"),  # no place: whatever it means, it is not this command's
        (("1", "2", None), "study localise", 2, "no place among processes"),
        (("1", "2", "1"), "detect --nonsense", 2, "rank 1 of 2: the following arguments are required: --model"),
    ],
)
def test_what_is_not_shared_runs_in_the_main_process_alone(monkeypatch, capsys, values, command, status, said):
    of_launch(monkeypatch, *values)
    monkeypatch.setattr(flags, "GRACE", 0.0)
    monkeypatch.setattr(sys, "argv", ["memorization", *command.split()])
    try:
        cli.main()
        ended = 0
    except SystemExit as error:
        ended = error.code or 0
    printed = "".join(capsys.readouterr())
    assert ended == status and (said in printed if said else not printed)


def test_torchrun(scored, tmp_path):
    root = GOLDEN.parent.parent
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", root / "detect_mem.py"]
    arguments = [*command, *scored[0], tmp_path / "run"]
    ended = subprocess.run([sys.executable, *map(str, arguments)], cwd=root, capture_output=True, text=True)
    assert ended.returncode == 0 and ended.stdout.count("scores:") == 1 and same(tmp_path / "run", scored[1])
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert [session["processes"] for session in record["sessions"]] == [2]
