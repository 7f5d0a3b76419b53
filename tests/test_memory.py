"""The batch size: measured on a run's first lines, by a clock whose speeds are known."""

import json
from types import SimpleNamespace

import pandas as pd
import pytest

from memorization.errors import InputError
from memorization.runs import memory, processes
from memorization.runs.detect import run_detection
from memorization.runs.processes import open_store
from memorization.runs.store import MemoryStore, ResultStore


class Machine:
    """Scores prompts in so many seconds a line, by batch size; has no memory for more than ``fits`` rows."""

    def __init__(self, monkeypatch, pace, fits=10**6, start=0.0, room=True):
        self.pace, self.fits, self.start, self.clock = pace, fits, start, 0.0
        self.batches, self.made_for = [], []  # (rows to a call, prompts); and of each scorer that was made
        monkeypatch.setattr(memory, "perf_counter", lambda: self.clock)
        monkeypatch.setattr(memory, "_has_room", lambda: room)

    def make(self, batch_size):
        self.made_for.append(batch_size)
        return Scorer(self, batch_size)


class Scorer:
    columns = ("prompt",)

    def __init__(self, machine, batch_size):
        self.machine, self.batch_size = machine, batch_size

    @property
    def prompts_at_once(self):
        return self.batch_size

    def __call__(self, prompts):
        machine, size = self.machine, self.batch_size
        if size > machine.fits:
            raise RuntimeError("CUDA out of memory. Tried to allocate")
        first = machine.start if size not in [used for used, _ in machine.batches] else 0.0
        machine.clock += machine.pace[size] * len(prompts) + first
        machine.batches.append((size, prompts))
        return [{"value": [float(size)]} for _ in prompts]


def listed(count):
    return pd.DataFrame({"prompt": [str(i) for i in range(count)]})


def run(machine, count, store, first=8, measure=True):
    run_detection(machine.make, listed(count), store, batch_size=first, measure=measure)
    assert [row["id"] for row in store.rows] == list(range(count))
    assert [row["prompt"] for row in store.rows] == [str(i) for i in range(count)]
    return store.record.get("batch_size_used")


SPEEDS = {
    "larger": ({8: 5, 16: 3, 32: 2, 64: 2.5}, 32),
    "smaller": ({2: 3, 4: 2, 8: 5, 16: 9}, 4),
    "first": ({4: 6, 8: 5, 16: 7}, 8),
    "hardly faster": ({4: 6, 8: 5, 16: 4.9}, 8),
}


@pytest.mark.parametrize(("pace", "best"), SPEEDS.values(), ids=SPEEDS)
def test_the_fastest_size_is_chosen_and_nothing_is_thrown_away(monkeypatch, pace, best):
    machine, store = Machine(monkeypatch, pace), MemoryStore({})
    assert run(machine, 4096, store) == best
    assert store.record["batch_sizes_tried"] == {str(size): pace[size] for size in pace}
    assert {size for size, _ in machine.batches} == set(pace)
    assert [prompt for _, prompts in machine.batches for prompt in prompts] == listed(4096)["prompt"].tolist()
    longest = max(i for i, (size, _) in enumerate(machine.batches) if size != best)
    tried = sum(pace[size] * len(prompts) for size, prompts in machine.batches[: longest + 1])
    assert tried <= 0.1 * 4096 * pace[best] * 1.5  # by the best pace that was known then
    assert all(int(prompts[0]) % best == 0 for _, prompts in machine.batches[longest + 2 :])


def test_the_first_batch_of_a_size_may_be_slow(monkeypatch):
    machine, store = Machine(monkeypatch, {4: 9, 8: 5, 16: 3, 32: 4}, start=100.0), MemoryStore({})
    assert run(machine, 40_000, store) == 16
    assert store.record["batch_sizes_tried"] == {"8": 5, "16": 3, "32": 4}


def test_a_short_list_tries_two_sizes_or_none(monkeypatch):
    machine = Machine(monkeypatch, {8: 5, 16: 3})
    assert run(machine, 32, MemoryStore({})) == 16
    assert [(size, len(prompts)) for size, prompts in machine.batches] == [(8, 8), (16, 16), (16, 8)]
    assert machine.made_for == [8]
    machine = Machine(monkeypatch, {8: 5})
    store = MemoryStore({})
    assert run(machine, 23, store) == 8
    assert [len(prompts) for _, prompts in machine.batches] == [8, 8, 7] and machine.made_for == [8]
    assert "batch_sizes_tried" not in store.record


def test_memory_bounds_the_sizes(monkeypatch):
    machine = Machine(monkeypatch, {8: 5, 16: 4, 32: 3}, fits=20)
    assert run(machine, 4096, MemoryStore({})) == 16
    machine = Machine(monkeypatch, {2: 5, 4: 6, 1: 4}, fits=2)
    assert run(machine, 4096, MemoryStore({}), first=32) == 1
    assert {size for size, _ in machine.batches} == {1, 2}
    with pytest.raises(InputError, match="even with one row"):
        run(Machine(monkeypatch, {}, fits=0), 4096, MemoryStore({}))
    machine = Machine(monkeypatch, {4: 6, 8: 5, 16: 3}, room=False)  # more would end the process unasked
    assert run(machine, 4096, MemoryStore({})) == 8


def test_an_error_is_no_lack_of_memory(monkeypatch):
    machine = Machine(monkeypatch, {8: 5})
    monkeypatch.setattr(Scorer, "__call__", lambda *_: (_ for _ in ()).throw(RuntimeError("shapes differ")))
    with pytest.raises(RuntimeError, match="shapes differ"):
        run(machine, 4096, MemoryStore({}))


def test_a_size_that_was_asked_for_is_taken_at_its_word(monkeypatch):
    machine, store = Machine(monkeypatch, {8: 5}), MemoryStore({})
    assert run(machine, 4096, store, measure=False) is None and {size for size, _ in machine.batches} == {8}


def test_a_resumed_run_keeps_the_size(monkeypatch, tmp_path):
    pace = {4: 9, 8: 5, 16: 3, 32: 4}
    with open_store(tmp_path / "whole", {}, {}) as store:
        run(Machine(monkeypatch, pace), 2000, store)

    class Killed(BaseException):
        pass

    def dies(after):
        machine = Machine(monkeypatch, pace)
        plain = Scorer.__call__

        def call(self, prompts):
            if len(machine.batches) == after:
                raise Killed
            return plain(self, prompts)

        with monkeypatch.context() as patched, open_store(tmp_path / str(after), {}, {}) as store:
            patched.setattr(Scorer, "__call__", call)
            with pytest.raises(Killed):
                run(machine, 2000, store)
        return json.loads((tmp_path / str(after) / "run.json").read_text())

    assert "batch_size_used" not in dies(3)  # among the trials: they begin anew, on the lines that are left
    assert dies(20)["batch_size_used"] == 16
    lines = (tmp_path / "20" / "scores.jsonl").read_bytes()
    again = Machine(monkeypatch, {16: 100})  # what is fast has changed, but nobody measures
    with open_store(tmp_path / "20", {}, {}) as store:
        assert run(again, 2000, store) == 16
    assert again.made_for == [16] and lines
    assert (tmp_path / "20" / "scores.jsonl").read_bytes() == (tmp_path / "whole" / "scores.jsonl").read_bytes()
    with open_store(tmp_path / "3", {}, {}) as store:
        assert run(Machine(monkeypatch, pace), 2000, store) == 16


def test_the_main_process_measures_for_all(monkeypatch, tmp_path):
    """It does so where that is short beside what the others wait for, and says the size when it deals."""
    for name, value in zip(("RANK", "WORLD_SIZE", "LOCAL_RANK"), "020", strict=True):
        monkeypatch.setenv(name, value)

    other = SimpleNamespace(look=lambda token: {"settings": {}, "done": True})
    monkeypatch.setattr(processes, "Peer", lambda *_: other)
    for count, tried, made in ((400, set(), {8}), (4000, {"8", "16"}, {8, 16})):
        machine = Machine(monkeypatch, {8: 5, 16: 3, 32: 9})
        with open_store(tmp_path / str(count), {}, {}) as store:
            with pytest.raises(InputError, match="is in no part"):  # the other makes none here
                run_detection(machine.make, listed(count), store, batch_size=8, measure=True)
            word = json.loads((tmp_path / str(count) / "scores.parts" / "main.json").read_text())
            assert word["batch_size_used"] == word["size"] == max(made)
            assert set(store.record.get("batch_sizes_tried", {})) - {"32"} == tried
            first, last = word["starts"][0], word["starts"][-1]
            assert first == sum(len(prompts) for _, prompts in machine.batches if int(prompts[0]) < first)
            assert first % max(made) == 0 and last + max(made) >= count > last
        lines = (tmp_path / str(count) / "scores.jsonl").read_bytes().splitlines()
        assert len(lines) == first + max(made)  # and the first batch that was dealt, which is the main process's


def test_the_room_is_that_of_the_process(monkeypatch):
    for available, room in ((99, False), (100, True)):
        monkeypatch.setattr(memory.psutil, "virtual_memory", lambda a=available: SimpleNamespace(available=a))
        monkeypatch.setattr(
            memory.psutil, "Process", lambda: SimpleNamespace(memory_info=lambda: SimpleNamespace(rss=100))
        )
        assert memory._has_room() == room


def test_what_was_tried_is_kept_in_the_record(monkeypatch, tmp_path):
    with ResultStore(tmp_path / "run", {"batch_size": "auto"}, {}) as store:
        run(Machine(monkeypatch, {8: 5, 16: 3, 32: 4}), 2000, store)
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["settings"] == {"batch_size": "auto"} and record["batch_size_used"] == 16
    assert record["batch_sizes_tried"] == {"8": 5.0, "16": 3.0, "32": 4.0}
