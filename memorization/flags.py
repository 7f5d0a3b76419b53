"""How a command reads its arguments, what each flag means, and how a command ends.

A flag means one thing everywhere: what several commands take is described here once.
"""

from __future__ import annotations

import argparse
import io
import os
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, Literal, NoReturn

from memorization.errors import AlreadySaid, InputError, printable
from memorization.launch import launched, start
from memorization.settings import Count, NotNegative, Rate, Resamples, Seed, Steps, Unfit, described, fit


class ArgumentParser(argparse.ArgumentParser):
    """argparse's, which says what is wrong in one line; the docstring it is given keeps its line breaks."""

    def __init__(self, **options) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (--help explains)")


def value(annotation: Any) -> Callable[[str], Any]:
    """What reads a flag's value, by an annotation of memorization/settings.py."""

    def read(text: str) -> Any:
        try:
            return fit(annotation, text)
        except Unfit:
            raise argparse.ArgumentTypeError(f"{text} is no {described(annotation)}") from None

    return read


def names(text: str) -> list[str]:
    """``A,B`` -> its parts."""
    return [name for part in text.split(",") if (name := part.strip())]


def adapter(text: str) -> tuple[Path, float]:
    """``FILE[:SCALE]`` -> the file and its scale, 1 where there is none."""
    name, _, scale = text.rpartition(":")
    try:
        return (Path(name), value(float)(scale)) if name else (Path(text), 1.0)
    except argparse.ArgumentTypeError:  # a colon of the path
        return Path(text), 1.0


FLAGS: dict[str, dict[str, Any]] = {
    "--model": dict(metavar="NAME|YAML|FOLDER|HUB_ID|FILE",
        help="a name (python -m memorization models lists them), a YAML file of your own, a folder, a hub id, or one "
             "file in safetensors or GGUF"),
    "--config": dict(metavar="FOLDER|HUB_ID",
        help="where the configs of a --model that is one file are, and the other parts of a GGUF (default: the hub "
             "client's cache; for a GGUF none)"),
    "--lora": dict(type=adapter, action="append", default=[], metavar="FILE[:SCALE]",
        help="a LoRA on top of the model, in safetensors; may be repeated"),
    "--prompts": dict(type=Path, metavar="FILE",
        help=".txt, .csv or .jsonl (column prompt or caption; optional label, family); default: the model's own list"),
    "--noises": dict(type=value(Count), metavar="N", help="noises a prompt (default: %(default)s)"),
    "--seed": dict(type=value(Seed), default=51,
        help="of the noise (default: %(default)s, that of the anisotropy paper's code)"),
    "--steps": dict(type=value(Steps), default=50,
        help="of a generation, and of the DDIM grid that places detectors' timesteps (default: %(default)s)"),
    "--guidance-scale": dict(type=value(NotNegative), metavar="S",
        help="of a generation (default: the model's config, else 7.5)"),
    "--calibration": dict(metavar="FILE|none",
        help="written by detect_eval.py --calibrate: thresholds, levels, and the settings they hold for"),
    "--index": dict(type=Path, metavar="DIR",
        help="of training pictures, for methods that need one (default: of those that the model's own list names)"),
    "--clip": dict(metavar="FOLDER|HUB_ID|none", help="judges text alignment (default: the model's config)"),
    "--sscd": dict(default="official-288", metavar="PRESET",
        help="how SSCD is given pictures: see memorization/similarity/sscd.py (default: %(default)s)"),
    "--dtype": dict(choices=["float32", "bfloat16", "float16"],
        help="default: the model's config, else bfloat16 where the hardware has it"),
    "--device": dict(default="auto", help="auto, cpu, cuda, cuda:1, ... (default: %(default)s)"),
    "--offload": dict(choices=["none", "model", "group"], default="none",
        help="for a model that does not fit the card: networks wait in the machine's memory and come one (model) or "
             "one layer (group) at a time (default: %(default)s)"),
    "--batch-size": dict(type=value(Count | Literal["auto"]), default="auto", metavar="N|auto",
        help="rows (prompt x noise) to a UNet call, halved on out of memory; auto is measured where a list is scored, "
             "and guessed elsewhere (default: %(default)s)"),
    "--out": dict(type=Path, metavar="DIR", help="default: results/local/detection/<model>/main"),
    "--overwrite": dict(action="store_true", help="start anew in a folder that holds a run"),
    "--resamples": dict(type=value(Resamples), default=1000, metavar="N",
        help="of the bootstrap over families (default: %(default)s)"),
    "--fpr": dict(type=value(Rate), default=0.01, metavar="X",
        help="false positive rate of a threshold (default: %(default)s)"),
    "--split": dict(choices=["validation", "test", "all"], default="validation",
        help="rows of the list, where it has splits (default: %(default)s)"),
}  # fmt: skip


def add_flags(parser: argparse.ArgumentParser, *flags: str, **changed: Any) -> None:
    """Add flags of :data:`FLAGS`.

    Args:
        changed: what differs for all of them, such as ``default`` or ``required``.
    """
    for flag in flags:
        parser.add_argument(*_spellings(flag), **{**FLAGS[flag], **changed})


def _spellings(flag: str) -> list[str]:
    """``--noises`` was once called ``--num-images``; both go."""
    return ["--noises", "--num-images"] if flag == "--noises" else [flag]


def add_settings(parser: argparse.ArgumentParser, help: str, *, of: str = "", **shortcuts: str) -> None:
    """``--set``, and flags that stand for one setting each.

    Args:
        of: the method whose settings the shortcuts are.
        shortcuts: setting -> its help.
    """
    metavar = "METHOD.SETTING=VALUE" if of else "SETTING=VALUE"
    common: dict[str, Any] = {"action": "append", "dest": "assignments"}
    parser.add_argument("--set", default=[], metavar=metavar, help=f"{help}; may be repeated", **common)
    for setting, text in shortcuts.items():
        flag = f"--{setting.replace('_', '-')}"
        parser.add_argument(flag, type=f"{of}.{setting}={{}}".format, metavar="VALUE", help=text, **common)


def assigned(text: str) -> tuple[str, str]:
    """(name, value) of ``--set NAME=VALUE``.

    Raises:
        InputError: it is none.
    """
    name, _, given = text.partition("=")
    if not name or not given:
        raise InputError(f"--set {text}: write SETTING=VALUE")
    return name, given


GRACE = 10.0  # seconds that the main process has to say first what stops all


class Terminated(BaseException):
    """The process was asked to end."""


def run_script(main: Callable[[], None]) -> None:
    """Run a command's main; whatever happens, standard error says it in one line. Of several processes the main one
    alone prints, and where the command is not marked as shared it alone runs.

    Exit status 2 for an :class:`InputError`; 1 where it was interrupted or terminated, where the reader of its output
    has gone, and for what nobody foresaw, whose traceback goes to a file.
    """
    quiet_libraries()
    _prepare_streams()
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        if launched().main:
            start(main)
        else:
            _help(main)
        sys.stdout.flush()
    except InputError as error:
        _end(f"error: {error}", 2)
    except BrokenPipeError:  # as in `| head`
        _forget_output()
        sys.exit(1)
    except KeyboardInterrupt:
        _end("interrupted", 1)
    except Terminated:
        _end("terminated; what is whole stays, and the same command goes on from there", 1)
    except Exception as error:
        kind = type(error).__name__
        _end(f"error: {kind}: {error} (nobody foresaw this; the traceback is in {_write_traceback()})", 1)
    finally:
        signal.signal(signal.SIGTERM, before)


def _help(main: Callable[[], None]) -> None:
    """Run a command's main in another process than the main one: nothing is printed, and of errors its own alone.

    What is wrong mostly stops all processes, and where one ends by an error the launcher ends the others: so this one
    waits, and has something to say only where it is still there afterwards.
    """
    try:
        with (
            open(os.devnull, "w", encoding="utf-8", errors="backslashreplace") as nowhere,
            redirect_stdout(nowhere),
            redirect_stderr(nowhere),
        ):
            try:
                start(main)
            except Exception as error:
                time.sleep(GRACE)
                if isinstance(error, AlreadySaid):
                    sys.exit(2)
                place = launched()
                if isinstance(error, InputError):
                    raise InputError(f"{place.named(place.rank)}: {error}") from None
                raise
    except (KeyboardInterrupt, Terminated):  # the main process says it
        sys.exit(1)


def _prepare_streams() -> None:
    """Letters that the terminal's encoding lacks are escaped; a stream that was closed swallows what it gets."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 - held until the end
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def _terminate(number: int, frame: object) -> NoReturn:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a second one ends it at once
    raise Terminated


def _forget_output() -> None:
    """What is left in the buffer of standard output goes nowhere; else Python says a word of its own as it ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _end(line: str, status: int) -> NoReturn:
    print(printable(line), file=sys.stderr)
    try:
        sys.stdout.flush()
    except OSError:  # a full disk
        _forget_output()
    sys.exit(status)


def _write_traceback() -> str:
    """The file that the traceback was written to, or a word why there is none."""
    try:
        with tempfile.NamedTemporaryFile(
            "w", prefix="memorization-", suffix=".txt", encoding="utf-8", errors="backslashreplace", delete=False
        ) as file:
            traceback.print_exc(file=file)
        return file.name
    except OSError as error:
        return f"no file: {error.strerror}"


def quiet_libraries() -> None:
    """No warnings and bars of the libraries: standard error is a command's own. Call it before they are imported."""
    for name in ("DIFFUSERS_VERBOSITY", "TRANSFORMERS_VERBOSITY", "HF_HUB_VERBOSITY"):
        os.environ.setdefault(name, "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if not sys.warnoptions:  # python -W shows them
        warnings.simplefilter("ignore")


Arguments = Sequence[str] | None  # what a command's main is given; None for those of the process
