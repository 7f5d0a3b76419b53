"""Faults in inputs: lists, pictures, indexes, servers; and how a command ends."""

import csv
import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import GOLDEN
from faults import JSON, LETTERS, ODD, damaged, examples, full_disk, make_odd, refused, taken_or_refused, within
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from memorization.cli.detect import print_summary
from memorization.flags import run_script as run_main
from memorization.index.build import build_index
from memorization.index.store import Index
from memorization.io import published
from memorization.io.pictures import read_picture
from memorization.io.prompts import listed, read_lists, read_prompts
from memorization.runs.store import ResultStore

ROOT = GOLDEN.parent.parent

LISTS = [
    (".csv", b"prompt,prompt\na,b\n", "prompt"), (".csv", b"Prompt,prompt \na,b\n", "prompt"),
    (".csv", b"caption,Caption\na,b\n", "prompt"), (".csv", b"prompt,label,label\na,1,0\n", "label"),
    (".csv", b"prompt,family,Family\na,b,c\n", "family"),
    (".csv", b"pro\0mpt,label\na,1\n", ""), (".csv", b"\n\n\n", "empty"), (".csv", b",,\n,,\n", "prompt"),
    (".csv", b"prompt,label\na\n", "row 1"), (".csv", b"prompt,label\na,1\nb,nan\n", "row 2"),
    (".csv", b"prompt,label\na,inf\n", "label"), (".csv", b"prompt,label\na,\n", "label"),
    (".csv", b"prompt,split\na,\n", "split"), (".csv", b"\xff\xfep\0r\0", "UTF-8"),
    (".jsonl", b'{"prompt": "a", "Prompt": "b"}\n', "prompt"), (".jsonl", b'{"prompt": ["a"]}\n', "row 1"),
    (".jsonl", b'{"prompt": "a", "label": [1]}\n', "label"), (".jsonl", b'{"prompt": "a", "label": {}}\n', "label"),
    (".jsonl", b'{"prompt": "a", "label": 1e999}\n', "label"),
    (".jsonl", b'{"prompt": "a", "split": ["test"]}\n', "split"),
    (".jsonl", b'{"prompt": "a", "family": ["x"]}\n', "family"), (".jsonl", b'{"prompt": "a", "image": {}}\n', "image"),
    (".jsonl", b'{"prompt": "a", "duplicates": [1]}\n', "duplicates"), (".jsonl", b"[" * 100_000 + b"\n", "line 1"),
    (".jsonl", b'{"prompt": "a"}\n' + b'{"a":' * 100_000, "line 2"), (".jsonl", b'{"prompt": 1}\n', "row 1"),
    (".jsonl", b'{"prompt": "a", "label": ' + b"9" * 500 + b"}\n", "label"),
    (".jsonl", b'{"prompt": "a"}{}\n', "line 1"),
    (".jsonl", b'{"prompt": "a", "label": ' + b"9" * 5000 + b"}\n", "line 1"),
    (".txt", b"\xff\xfea\0", "UTF-8"), (".txt", b"\xef\xbb\xbf\n", "empty"), (".TXT", b"a\n", ".TXT"),
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(LISTS)))
def test_lists_that_are_refused(tmp_path, number):
    suffix, content, said = LISTS[number]
    path = tmp_path / f"list{suffix}"
    path.write_bytes(content)
    refused(lambda: read_lists({"prompts": path}), str(path), said)


@pytest.mark.parametrize(
    ("suffix", "content", "column", "expected"),
    [
        (".csv", b" prompt , label \na,1\n", "label", [1]),
        (".csv", b"prompt\t\na\n", "prompt", ["a"]),
        (".csv", b"id,prompt,id\n1,a,2\n", "prompt", ["a"]),
        (".csv", b"prompt,,\na,b,c\n", "prompt", ["a"]),
        (".csv", b"prompt,type,overfit_type\na,b,c\n", "kind", ["b"]),
        (".jsonl", b'{" Prompt ": "a"}\n', "prompt", ["a"]),
        (
            ".jsonl",
            b'{"prompt": "a", "label": 1, "family": "x"}\n{"prompt": "b", "label": 0}\n',
            "family",
            ["f0", "f1"],
        ),
        (".jsonl", b'{"prompt": "a", "label": 1, "family": NaN}\n', "family", ["f0"]),
        (".jsonl", b'{"prompt": "a", "label": 1, "family": 0}\n', "family", [0]),
    ],
)
def test_lists_that_are_read(tmp_path, suffix, content, column, expected):
    path = tmp_path / f"list{suffix}"
    path.write_bytes(content)
    assert read_lists({"prompts": path}).frame[column].tolist() == expected


COLUMNS = st.sampled_from(
    ["prompt", "caption", "label", "family", "kind", "type", "split", "image", "duplicates", "id"]
)
CELLS = JSON | st.sampled_from([0, 1, "0", "1", "validation", "test", "a kite"])


@examples(250)
@given(rows=st.lists(st.dictionaries(COLUMNS, CELLS, max_size=5), max_size=4), label=st.booleans())
def test_any_rows_are_a_list_or_refused(tmp_path_factory, rows, label):
    path = tmp_path_factory.getbasetemp() / "rows.jsonl"
    rows = [{"prompt": "a", **({"label": 1} if label else {}), **row} for row in rows]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = taken_or_refused(lambda: read_lists({"prompts": path}).frame)
    if found is not None:
        assert all(isinstance(prompt, str) for prompt in found["prompt"]) and len(found) == len(rows)
        assert "label" not in found or set(found["label"]) <= {0, 1}


@examples(150)
@given(prompts=st.lists(LETTERS, min_size=1, max_size=4), separator=st.sampled_from(",;"))
def test_any_text_in_a_csv_comes_back(tmp_path_factory, prompts, separator):
    path, text = tmp_path_factory.getbasetemp() / "any.csv", io.StringIO()
    csv.writer(text, delimiter=separator).writerows([["id", "prompt"], *([str(i), p] for i, p in enumerate(prompts))])
    path.write_bytes(text.getvalue().encode("utf-8", "surrogatepass"))
    found = taken_or_refused(lambda: read_prompts(path))
    assert found is None or [p.replace("\r", "") for p in found["prompt"]] == [p.replace("\r", "") for p in prompts]


@examples(150)
@given(content=st.binary(max_size=60) | LETTERS.map(lambda text: text.encode("utf-8", "surrogatepass")),
       suffix=st.sampled_from([".txt", ".csv", ".jsonl"]))  # fmt: skip
def test_any_bytes_are_a_list_or_refused(tmp_path_factory, content, suffix):
    path = tmp_path_factory.getbasetemp() / f"bytes{suffix}"
    path.write_bytes(content)
    taken_or_refused(lambda: read_prompts(path))


@examples(100)
@given(prompts=JSON)
def test_any_value_is_a_list_in_memory_or_refused(prompts):
    if isinstance(prompts, (list, dict)):
        taken_or_refused(lambda: listed(list(prompts)))


# Pictures.


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I"])
@pytest.mark.parametrize("suffix", [".png", ".tiff"])
def test_grey_of_16_bits_is_not_cut_off(tmp_path, mode, suffix):
    ramp = np.linspace(0, 65535, 64).reshape(8, 8).astype(np.uint16)
    path = tmp_path / f"a{suffix}"
    if mode == "I" and suffix == ".tiff":
        Image.fromarray(ramp.astype(np.int32)).save(path)
    elif mode == "I;16B" and suffix == ".tiff":
        Image.frombytes("I;16B", (8, 8), ramp.astype(">u2").tobytes()).save(path)
    else:
        Image.fromarray(ramp).save(path)
    found = taken_or_refused(lambda: read_picture(path, None))
    assert found is None or np.abs(found[..., 0] - ramp / 257.0).max() <= 1


@pytest.mark.parametrize("turned", range(1, 9))
@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp"])
def test_pictures_are_the_way_up_that_they_say(tmp_path, turned, suffix):
    picture = Image.new("RGB", (8, 16), "black")
    picture.paste("white", (0, 0, 8, 4))
    exif = Image.Exif()
    exif[0x0112] = turned
    path = tmp_path / f"a{suffix}"
    picture.save(path, exif=exif)
    found = read_picture(path, None)[..., 0] > 127
    edges = {"top": found[0].all(), "bottom": found[-1].all(), "left": found[:, 0].all(), "right": found[:, -1].all()}
    assert [edge for edge, white in edges.items() if white] == [
        ["top", "top", "bottom", "bottom", "left", "right", "right", "left"][turned - 1]
    ]


def png():
    made = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3)).save(made, "PNG", exif=exif)
    return made.getvalue()


@examples(200)
@given(data=st.data())
def test_a_damaged_picture_is_read_or_refused(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "damaged.png"
    path.write_bytes(damaged(data, png()))
    taken_or_refused(lambda: read_picture(path, (8, 8)))


# Indexes.


@pytest.fixture
def folder(tmp_path):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for i in range(6):
        Image.new("RGB", (8, 8), (40 * i, 0, 0)).save(pictures / f"{i} é.png")
    return pictures


def build(folder, out, **options):
    return build_index(folder, out, "pixels", (8, 8), **options)


REWRITTEN = {
    "compact": lambda rows: "".join(json.dumps(row, separators=(",", ":"), ensure_ascii=False) + "\n" for row in rows),
    "escaped": lambda rows: "".join(json.dumps(row) + "\n" for row in rows),
    "windows": lambda rows: "".join(json.dumps(row) + "\r\n" for row in rows),
    "spaced": lambda rows: "".join(json.dumps(row, separators=(" , ", " : ")) + "  \n" for row in rows),
    "sorted": lambda rows: "".join(json.dumps(row, sort_keys=True) + "\n" for row in rows),
}


@pytest.mark.parametrize("writer", list(REWRITTEN))
def test_items_that_another_program_rewrote_are_not_destroyed(folder, tmp_path, writer):
    whole = build(folder, tmp_path / "index")
    path = tmp_path / "index" / "items.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_bytes(REWRITTEN[writer](rows).encode())
    before = path.read_bytes()
    again = build(folder, tmp_path / "index")
    assert path.read_bytes() == before and again.paths == whole.paths and again.digest == whole.digest
    Image.new("RGB", (8, 8), "blue").save(folder / "new.png")
    more = build(folder, tmp_path / "index")
    assert len(more) == 7 and path.read_bytes().startswith(before)
    assert np.array_equal(more.features[:6], whole.features)


@pytest.mark.parametrize("number", [0, 3, 5])
def test_a_picture_that_was_replaced_is_read_again(folder, tmp_path, number):
    first = build(folder, tmp_path / "index")
    before = first.digest  # of the files as they are now
    Image.new("RGB", (8, 8), "lime").save(folder / f"{number} é.png")
    again = build(folder, tmp_path / "index", at_once=2)
    fresh = build(folder, tmp_path / "fresh")
    assert np.array_equal(again.features, fresh.features) and again.paths == first.paths
    assert again.digest == fresh.digest != before


def test_a_build_that_is_killed_while_it_replaces_does_it_again(folder, tmp_path, monkeypatch):
    from memorization.index import build as module

    build(folder, tmp_path / "index")
    for i in (1, 4):
        Image.new("RGB", (8, 8), "lime").save(folder / f"{i} é.png")
    plain, calls = module.read_or_skip, []

    def killed(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return plain(*arguments)

    monkeypatch.setattr(module, "read_or_skip", killed)
    with pytest.raises(KeyboardInterrupt):
        build(folder, tmp_path / "index", at_once=1)
    monkeypatch.setattr(module, "read_or_skip", plain)
    assert np.array_equal(build(folder, tmp_path / "index").features, build(folder, tmp_path / "fresh").features)


def test_a_replaced_picture_that_cannot_be_read_keeps_its_features(folder, tmp_path, capsys):
    first = build(folder, tmp_path / "index")
    features = np.array(first.features)
    (folder / "2 é.png").write_bytes(b"no picture")
    assert np.array_equal(build(folder, tmp_path / "index").features, features)
    assert "skipped: " in capsys.readouterr().err


def test_items_without_their_index_json_are_not_built_over(folder, tmp_path):
    build(folder, tmp_path / "index")
    (tmp_path / "index" / "index.json").unlink()
    before = (tmp_path / "index" / "items.jsonl").read_bytes()
    refused(lambda: build_index(folder, tmp_path / "index", "pixels", (4, 4)), "index.json")
    assert (tmp_path / "index" / "items.jsonl").read_bytes() == before


INDEX_DAMAGES = [
    ("index.json", {"kind": "pixel"}, "kind"), ("index.json", {"kind": None}, "kind"),
    ("index.json", {"kind": 3}, "kind"),
    ("index.json", {"size": 8}, "size"), ("index.json", {"size": [0, 8]}, "size"),
    ("index.json", {"size": "8"}, "size"),
    ("index.json", {"size": [8.5, 8]}, "size"), ("index.json", {"width": 0}, "width"),
    ("index.json", {"width": "192"}, ""), ("index.json", {"width": None}, "width"),
    ("index.json", {"width": -1}, "width"),
    ("index.json", {"width": 10**12}, "width"), ("index.json", {"width": True}, "width"),
    ("index.json", {"model": 3}, "model"), ("index.json", {"size": [8]}, "size"),
    ("index.json", {"size": [8, 9]}, "width"),
    ("items.jsonl", {"path": None}, "path"), ("items.jsonl", {"path": 3}, "path"),
    ("items.jsonl", {"caption": None}, "caption"),
    ("items.jsonl", {"caption": ["a"]}, "caption"), ("items.jsonl", {"file": 3}, "file"),
    ("items.jsonl", {"file": None}, "file"),
    ("items.jsonl", {"sha256": 3}, "sha256"),
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(INDEX_DAMAGES)))
def test_damaged_fields_of_an_index(folder, tmp_path, number):
    name, change, said = INDEX_DAMAGES[number]
    build(folder, tmp_path / "index")
    path = tmp_path / "index" / name
    first, *rest = path.read_text().splitlines()
    path.write_text("\n".join([json.dumps({**json.loads(first), **change}), *rest]) + "\n")
    if change == {"width": "192"}:  # text that means a number is one
        assert len(Index(tmp_path / "index")) == 6
        return
    refused(lambda: Index(tmp_path / "index"), str(tmp_path), said)


@pytest.mark.parametrize("name", ["index.json", "items.jsonl", "features.bin"])
@pytest.mark.parametrize("kind", [*ODD, "missing"])
def test_files_of_an_index_that_are_none(folder, tmp_path, name, kind):
    build(folder, tmp_path / "index")
    (tmp_path / "index" / name).unlink()
    make_odd(tmp_path / "index" / name, kind)
    with within(10):
        refused(lambda: Index(tmp_path / "index"), str(tmp_path))


@pytest.mark.parametrize("name", ["items.jsonl", "features.bin"])
@pytest.mark.parametrize("kind", ["pipe", "folder", "loop"])
def test_building_into_what_is_no_file(folder, tmp_path, name, kind):
    build(folder, tmp_path / "index")
    (tmp_path / "index" / name).unlink()
    make_odd(tmp_path / "index" / name, kind)
    with within(10):
        refused(lambda: build(folder, tmp_path / "index"), str(tmp_path))


@examples(100)
@given(data=st.data())
def test_a_damaged_index_is_read_or_refused(tmp_path_factory, data):
    base = tmp_path_factory.getbasetemp()
    if not (base / "whole" / "index.json").exists():
        (base / "some").mkdir()
        for i in range(3):
            Image.new("RGB", (8, 8), (40 * i, 0, 0)).save(base / "some" / f"{i}.png")
        build(base / "some", base / "whole")
    (base / "broken").mkdir(exist_ok=True)
    files = {path.name: path.read_bytes() for path in (base / "whole").iterdir()}
    name = data.draw(st.sampled_from(["index.json", "items.jsonl", "features.bin"]))
    files[name] = damaged(data, files[name])
    for one, content in files.items():
        (base / "broken" / one).write_bytes(content)
    taken_or_refused(lambda: Index(base / "broken"))


@pytest.mark.parametrize("size", [0, 50, 300, 700])
def test_an_index_on_a_full_disk_goes_on_later(folder, tmp_path, size):
    with full_disk(size):
        refused(lambda: build(folder, tmp_path / "index", at_once=2), "cannot be written")
    assert not list(tmp_path.rglob("*.part"))
    assert np.array_equal(build(folder, tmp_path / "index").features, build(folder, tmp_path / "fresh").features)


# Servers.


def serve(answer):
    """A server that gives one answer; its URL."""
    listening = socket.create_server(("127.0.0.1", 0))

    def one():
        connection, _ = listening.accept()
        try:
            connection.recv(65536)
            answer(connection)
        except OSError:
            pass
        finally:
            connection.close()
            listening.close()

    threading.Thread(target=one, daemon=True).start()
    return f"http://127.0.0.1:{listening.getsockname()[1]}"


def drip(connection, text):
    stop = threading.Event()
    for letter in text:
        connection.sendall(letter.encode())
        if stop.wait(0.05):
            break


HEAD = b"HTTP/1.1 200 OK\r\n"
ANSWERS = {
    "endless": (lambda c: [c.sendall(HEAD + b"\r\n"), *[c.sendall(b"x" * 65536) for _ in range(256)]], "larger than"),
    "dripping body": (lambda c: [c.sendall(HEAD + b"\r\n"), drip(c, "x" * 100)], "not whole after"),
    "dripping head": (lambda c: drip(c, "HTTP/1.1 200 OK\r\n" + "a: b\r\n" * 20), "not whole after"),
    "cut short": (lambda c: c.sendall(HEAD + b"Content-Length: 100\r\n\r\nabc"), "sha256"),
    "no answer": (lambda c: None, "cannot be had"),
    "garbage": (lambda c: c.sendall(b"\x00\x01\x1b[31m\n"), "cannot be had"),
    "missing": (lambda c: c.sendall(b"HTTP/1.1 404 Not \x1b[31mFound\r\n\r\n"), "cannot be had"),
    "negative": (lambda c: c.sendall(HEAD + b"Content-Length: -5\r\n\r\nabc"), "sha256"),
    "another": (lambda c: c.sendall(HEAD + b"\r\nabc"), "sha256"),
    "chunks": (lambda c: c.sendall(HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n"), "cannot be had"),
}  # fmt: skip


@pytest.mark.parametrize("name", list(ANSWERS))
def test_servers_that_misbehave(tmp_path, monkeypatch, name):
    monkeypatch.setattr(published, "LONGEST", 1, raising=False)
    monkeypatch.setattr(published, "LARGEST", 100_000, raising=False)
    answer, said = ANSWERS[name]
    with within(20):
        refused(lambda: published.fetch(tmp_path / "out", serve(answer)), said)
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    "source", ["nowhere", "http://", "http://[", "gopher://x/y", "http://127.0.0.1:1", "a\0b", "http://x y/"]
)
def test_sources_that_are_none(tmp_path, source):
    with within(20):
        refused(lambda: published.fetch(tmp_path / "out", source))


# What is printed.

ESCAPES = ["\x1b[31mred", "\x1b]0;title\x07", "a\rb", "\x9b31m", "\x08\x08", "a\u202eb", "a\u2028b", "a\nb", "\x7f"]


@pytest.mark.parametrize("text", ESCAPES)
def test_prompts_are_printed_escaped(tmp_path, capsys, text):
    rows = [{"id": 0, "prompt": f"{text} kite", "noise_norm": [1.0]}]
    print_summary(rows, "noise_norm", 0.5, tmp_path / "scores.jsonl")
    out = capsys.readouterr().out
    assert text not in out and "kite" in out and out.count("\n") == 3


@pytest.mark.parametrize("text", ESCAPES)
def test_other_prompts_are_printed_escaped(tmp_path, capsys, text):
    from memorization.cli import index as command
    from memorization.cli.mitigate import print_report

    row = {"prompt": f"{text} kite", "new_prompt": f"{text} boat", "score_before": 1.0, "score_after": 0.5}
    print_report([row], tmp_path, {}, tmp_path / "sheet.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "list.jsonl").write_text(json.dumps({"prompt": f"{text} kite", "image": "a.png"}))
    build(tmp_path / "list.jsonl", tmp_path / "index")
    command.main(["search", str(tmp_path / "index"), str(tmp_path / "a.png")])
    assert text not in capsys.readouterr().out


@examples(200)
@given(text=LETTERS)
def test_any_error_is_one_line_that_a_terminal_shows(text):
    from memorization.errors import InputError

    line = str(InputError(text))
    assert len(line.splitlines()) <= 1 and not any(letter < " " or "\x7f" <= letter < "\xa0" for letter in line)
    line.encode()


# How a command ends.


def ends(body, **options):
    """A process that runs ``body`` as a command's main."""
    text = "\n".join(f"    {line}" for line in body.splitlines())
    head = "import os, signal, sys, time\nfrom memorization.flags import run_script\n"
    code = f"{head}def main():\n{text}\nrun_script(main)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.PIPE, text=True, timeout=20,
                          **{"stdout": subprocess.PIPE, **options})  # fmt: skip
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr, done.stderr
    return done


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        ("raise ZeroDivisionError('by nothing')", 1, "ZeroDivisionError"),
        ("raise OSError(28, 'No space left on device')", 1, "No space left"),
        ("raise MemoryError", 1, "MemoryError"),
        ("raise ValueError('two\\nlines \\x1b[31m')", 1, "two\\nlines"),
        ("def again(): again()\nagain()", 1, "RecursionError"),
        ("os.kill(os.getpid(), signal.SIGTERM); time.sleep(9)", 1, "terminated"),
        ("os.kill(os.getpid(), signal.SIGINT); time.sleep(9)", 1, "interrupted"),
        ("from memorization.errors import InputError\nraise InputError('two\\nlines \\x1b[31m')", 2, "two\\nlines"),
        ("print(chr(233) + chr(0x1F600) + chr(0xDCE9))", 0, ""),
    ],
)
def test_every_end_is_one_line(body, status, said):
    done = ends(body, env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert done.returncode == status and said in done.stderr and done.stderr.count("\n") == (1 if status else 0)
    if "traceback is in " in done.stderr:
        path = done.stderr.split("traceback is in ")[1].rstrip(")\n")
        with open(path, encoding="utf-8") as file:
            assert "Traceback" in file.read()
        Path(path).unlink()


@pytest.mark.parametrize("lines", [1, 100_000])
@pytest.mark.parametrize("kind", ["reader gone", "closed", "full"])
def test_standard_output_that_takes_nothing(kind, lines):
    body = f"for _ in range({lines}): print('x')"
    if kind == "reader gone":
        read, write = os.pipe()
        os.close(read)
        done = ends(body, stdout=write)
        os.close(write)
        assert done.returncode == 1 and not done.stderr
    elif kind == "closed":
        done = ends(body, stdout=None, preexec_fn=lambda: os.close(1))
        assert done.returncode == 0 and not done.stderr
    else:
        with open("/dev/full", "w") as full:
            done = ends(body, stdout=full)
        assert done.returncode == 1 and done.stderr.count("\n") == 1 and "No space left" in done.stderr


def test_a_run_that_is_terminated_says_so(tmp_path, capsys):
    def main():
        with ResultStore(tmp_path, {}, {}) as store:
            store.start()
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with pytest.raises(SystemExit) as ended:
            run_main(main)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert ended.value.code == 1 and "terminated" in capsys.readouterr().err
    assert json.loads((tmp_path / "run.json").read_text())["status"] == "stopped"


# Scale.


def by_definition(prompts):
    """Families, pair by pair."""
    sets = [set(prompt.lower().split()) or {"(blank)"} for prompt in prompts]
    family = list(range(len(sets)))
    for i in range(len(sets)):
        for j in range(i):
            if 2 * len(sets[i] & sets[j]) >= len(sets[i] | sets[j]):
                family = [family[j] if one == family[i] else one for one in family]
    return [f"f{list(dict.fromkeys(family)).index(one)}" for one in family]


WORDS = st.lists(
    st.sampled_from(["a", "b", "c", "d", "e", "f", "g", "h", "i", "j", "k", "A", "B", "é"]), max_size=9
).map(" ".join)


@examples(300)
@given(prompts=st.lists(WORDS, min_size=1, max_size=30), small=st.sampled_from([2, 3, 48]))
def test_families_are_as_they_are_defined(prompts, small):
    from memorization.io import families

    plain, families.SMALL = families.SMALL, small
    try:
        assert families.near_copy_families(prompts) == by_definition(prompts)
    finally:
        families.SMALL = plain


@pytest.mark.parametrize("name", ["testbed", "testbed-v"])
def test_families_of_the_shipped_lists(name):
    from memorization.io.prompts import near_copy_families

    prompts = read_prompts(ROOT / "prompts" / f"{name}.csv")["prompt"].tolist()
    assert near_copy_families(prompts) == by_definition(prompts)


@pytest.mark.parametrize(
    "pattern", ["a picture of thing number {i} in blue", "prompt {i}", "same prompt", "{i} {j} of {k}"]
)
def test_families_of_many_prompts_need_little_memory(pattern):
    from memorization.io.prompts import near_copy_families

    prompts = [pattern.format(i=i, j=i % 97, k=i % 89) for i in range(8000)]
    tracemalloc.start()
    near_copy_families(prompts)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 150e6


def test_a_note_on_many_prompts_tokenizes_few(tiny_eps):
    import pandas as pd

    from memorization.runs.detect import notes_on

    plain, seen = tiny_eps.tokenizer, []

    class Counting:
        model_max_length = plain.model_max_length

        def __call__(self, prompts, **options):
            seen.append(len(prompts))
            one = plain(prompts[:1], **options).input_ids  # they are all alike
            return SimpleNamespace(input_ids=one * len(prompts))

    pipe = SimpleNamespace(tokenizer=Counting(), can={"text"})
    prompts = ["a red kite"] * 30_000 + ["word " * 80] * 11_000
    assert "11000 prompts over 77 tokens" in notes_on(pipe, pd.DataFrame({"prompt": prompts}))
    assert sum(seen) == 11_000 and max(seen) <= 10_000


def test_a_very_long_prompt_is_rewritten_in_time(tiny_eps):
    from memorization.mitigations.rewrite import word_order

    class Subject:
        pipe, grid, noise = tiny_eps, [981], tiny_eps.pure_noise(1, 0)
        uncond = tiny_eps.predict_uncond(noise, [981])

    with torch.no_grad():
        order = word_order(Subject(), "kite over two boats " * 1250)
    assert 0 < len(order) <= 77
