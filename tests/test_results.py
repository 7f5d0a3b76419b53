"""The result store: nothing lost, nothing mixed."""

import json

import pytest

from memorization.errors import InputError
from memorization.io.files import LineFile, read_lines, read_whole_lines
from memorization.runs.store import MemoryStore, ResultStore


def rows(start, stop):
    return [{"id": i, "prompt": f"p{i} é", "score": [0.5]} for i in range(start, stop)]


def test_goes_on_where_it_stopped_and_survives_a_torn_line(tmp_path):
    with ResultStore(tmp_path / "run", {"seed": 1}, {}) as store:
        store.start()
        store.append(rows(0, 3))
    whole = store.scores.read_bytes()
    store.scores.write_bytes(whole[:-7])
    with ResultStore(tmp_path / "run", {"seed": 1}, {}) as again:
        assert again.done == 2
        again.start()
        again.append(rows(2, 3))
    assert store.scores.read_bytes() == whole
    assert [session["from"] for session in json.loads((tmp_path / "run" / "run.json").read_text())["sessions"]] == [
        0,
        2,
    ]


def test_lines_are_on_disk_as_soon_as_they_are_appended(tmp_path):
    with ResultStore(tmp_path / "run", {}, {}) as store:
        store.start()
        store.append(rows(0, 2))
        assert len(read_lines(store.scores)[0]) == 2


def test_changed_settings_are_refused_and_named(tmp_path):
    with ResultStore(tmp_path / "run", {"seed": 1, "steps": 50}, {}) as store:
        store.start()
        store.append(rows(0, 1))
    with pytest.raises(InputError, match=r"seed: 1 there, 2 asked"):
        ResultStore(tmp_path / "run", {"seed": 2, "steps": 50}, {})
    with ResultStore(tmp_path / "run", {"seed": 2, "steps": 50}, {}, overwrite=True) as fresh:
        assert fresh.done == 0


def test_two_runs_into_one_folder(tmp_path):
    with ResultStore(tmp_path / "run", {}, {}) as store:
        store.start()
        with pytest.raises(InputError, match="another run is writing"):
            ResultStore(tmp_path / "run", {}, {}, overwrite=True)
        store.append(rows(0, 2))
    assert len(read_lines(store.scores)[0]) == 2
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "complete"


def test_damaged_line_is_named(tmp_path):
    (tmp_path / "scores.jsonl").write_text('{"id": 0}\n{broken}\n{"id": 2}\n')
    with pytest.raises(InputError, match="line 2: damaged"):
        read_lines(tmp_path / "scores.jsonl")


def test_unwritable_output(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        ResultStore(tmp_path / "file" / "run", {}, {})


def test_stopped_run_says_so(tmp_path):
    with pytest.raises(RuntimeError), ResultStore(tmp_path, {}, {}) as store:
        store.start()
        raise RuntimeError
    assert json.loads((tmp_path / "run.json").read_text())["status"] == "stopped"


@pytest.mark.parametrize("status", ["running", "stopped"])
def test_a_run_that_was_killed_after_its_last_line_becomes_complete(tmp_path, status):
    with ResultStore(tmp_path, {"seed": 1}, {}) as store:
        store.start()
        store.append(rows(0, 2))
        store.save(status)
        store._started = None  # SIGKILL: nothing more is said
    for count, said in ((3, status), (2, "complete")):
        with ResultStore(tmp_path, {"seed": 1}, {}) as again:
            assert again.lacks(count) == (count == 3)
        record = json.loads((tmp_path / "run.json").read_text())
        assert record["status"] == said and record.get("lines") == (2 if said == "complete" else None)
    with pytest.raises(RuntimeError), ResultStore(tmp_path, {"seed": 1}, {}, overwrite=True) as store:
        assert not store.lacks(0)
        raise RuntimeError
    assert json.loads((tmp_path / "run.json").read_text()) == record


def test_a_run_in_memory_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with MemoryStore({"seed": 1}) as store:
        store.start()
        store.append(rows(0, 2))
        store.save("running")
    assert store.done == 2 and store.rows == rows(0, 2) and not list(tmp_path.iterdir())


def test_lines_of_another_process_are_waited_for_by_nobody(tmp_path):
    held = LineFile(tmp_path / "items.jsonl", "is busy")
    with pytest.raises(InputError, match="is busy"):
        LineFile(tmp_path / "items.jsonl", "is busy")
    held.append([{"a": 1}])
    held.close()
    (tmp_path / "items.jsonl").write_bytes((tmp_path / "items.jsonl").read_bytes() + b'{"a": 2')
    found, size = read_whole_lines(tmp_path / "items.jsonl", "make it anew")
    assert found == [{"a": 1}] and size == 9
    with LineFile(tmp_path / "items.jsonl", "is busy") as again:
        again.cut(size)
        again.append([{"a": 2}])
    assert read_whole_lines(tmp_path / "items.jsonl", "")[0] == [{"a": 1}, {"a": 2}]
