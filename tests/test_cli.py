"""The command with its subcommands, and what the house promises about imports."""

import json
import re
import subprocess
import sys

import pytest
from conftest import GOLDEN

from memorization import __version__, cli
from memorization.audit.measures.base import MEASURES
from memorization.audit.signals.base import SIGNALS
from memorization.detectors.base import DETECTORS
from memorization.errors import InputError
from memorization.mitigations.base import MITIGATIONS
from memorization.paths import safe_name

ROOT = GOLDEN.parent.parent
HEAVY = "torch", "diffusers", "transformers", "pandas", "matplotlib", "sklearn"


def imported_by(*programs: str) -> dict[str, set[str]]:
    """Which of the heavy libraries are there after each of some programs; they run in turn, in one process.

    A program that is not named found none of them, neither its own nor of those before it.
    """
    code = "import json, sys\nseen = []\n" + "".join(f"{code}\nseen.append([*sys.modules])\n" for code in programs)
    done = subprocess.run([sys.executable, "-c", f"{code}print(json.dumps(seen), file=sys.stderr)"], cwd=ROOT,
                          capture_output=True, text=True, check=True)  # fmt: skip
    seen = json.loads(done.stderr.splitlines()[-1])
    return {code: heavy for code, names in zip(programs, seen, strict=True) if (heavy := {*HEAVY} & {*names})}


def test_the_package_is_imported_without_anything_heavy():
    assert not imported_by("import memorization; memorization.__version__, memorization.register_detector")


def test_help_needs_nothing_heavy():
    commands = ["detect", "eval", "mitigate", "index build", "audit", "report", "gate", "adapter", "index search",
                "index duplicates", "index merge", "index import", "study", "prompts", "models", ""]  # fmt: skip
    calls = [f"try: cli.dispatch({[*command.split(), '--help']})\nexcept SystemExit: pass" for command in commands]
    assert not imported_by("from memorization import cli", *calls)


def test_scripts_are_thin_and_quick_to_help():
    scripts = ["detect_mem", "detect_eval", "mitigate_mem"]
    assert all(len((ROOT / f"{script}.py").read_text().splitlines()) <= 60 for script in scripts)
    assert not imported_by(*[f"import {script}\ntry: {script}.main(['--help'])\nexcept SystemExit: pass"
                             for script in scripts])  # fmt: skip


def test_an_index_is_read_without_the_networks():
    found = imported_by("import memorization.index.store, memorization.index.build")
    assert not {"diffusers", "transformers"} & set().union(*found.values())


def test_dispatch(capsys):
    cli.dispatch(["models"])
    assert "testbed-eps" in capsys.readouterr().out
    cli.dispatch(["models", "sd14"])
    assert "CompVis/stable-diffusion-v1-4" in capsys.readouterr().out
    cli.dispatch(["--version"])
    assert capsys.readouterr().out.strip() == __version__
    cli.dispatch(["study"])
    assert "timestep_sweep" in capsys.readouterr().out
    for arguments, said in ((["frob"], "no command 'frob'; there are: detect"), (["study", "frob"], "no study 'frob'")):
        with pytest.raises(InputError, match=said):
            cli.dispatch(arguments)


@pytest.mark.parametrize("name", ["memorization.prompts", "memorization.index", "memorization"])
def test_commands_by_their_old_names(name):
    done = subprocess.run([sys.executable, "-m", name, "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("usage:")


def test_help_of_a_method_lists_its_settings(capsys):
    from memorization.cli import mitigate

    with pytest.raises(SystemExit):
        mitigate.parse(["--method", "sail", "--help"])
    said = capsys.readouterr().out
    assert re.search(r"alpha +number of at least 0; default: 0.05", said) and "0.99, 0.9, 0.75" in said


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--set", "sharpness.method=exakt", "--detectors", "sharpness"], "method = exakt is not one of"),
        (["--variant", "offical"], "variant = offical is not one of official, eps"),
        (["--set", "noise_norm=3"], "write DETECTOR.SETTING=VALUE"),
        (["--set", "p_laplace.points=3"], "of a detector that --detectors names"),
        (["--variant", "eps", "--detectors", "noise_norm"], "of a detector that --detectors names"),
        (["--guidance-scale", "-1"], "no number of at least 0"),
    ],
)
def test_settings_of_the_command_line(prompt_file, arguments, said):
    from memorization.cli import detect

    with pytest.raises(InputError, match=said):
        detect.main(["--model", str(GOLDEN / "tiny-eps"), "--prompts", str(prompt_file), *arguments])


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["eval", "run", "--fpr", "0"], "0 is no number above 0 to 0.999"),
        (["eval", "run", "--resamples", "10"], "10 is no whole number of at least 100"),
        (["study", "sequential", "run", "--fpr", "2"], "2 is no number above 0 to 0.999"),
        (["study", "benchmark_audit", "--resamples", "10"], "10 is no whole number of at least 100"),
        (["study", "timestep_sweep", "--every", "0"], "0 is no whole number of at least 1"),
        (["study", "p_laplace_sweep", "--timesteps", "1000"], "1000 is no whole number from 0 to 999"),
        (["study", "gaussian_mixture", "--points", "many"], "many is no whole number of at least 1"),
        (["index", "compress", "folder", "--code", "0"], "0 is no whole number of at least 1"),
    ],
)
def test_values_of_flags_are_checked_in_every_command(command, said):
    with pytest.raises(InputError, match=said):
        cli.dispatch(command)


def test_a_shortcut_is_a_setting():
    from memorization.cli import detect

    args = detect.parse(
        ["--model", "x", "--variant", "eps", "--cosine-mode", "x|c,c|x", "--set", "anisotropy.branch=v"]
    )
    assert args.settings == {"anisotropy": {"variant": "eps", "cosine_mode": "x|c,c|x", "branch": "v"}}


def test_names_of_files_are_fit_for_every_system():
    assert safe_name("amg main") == "amg main" and safe_name("a:b/c?.") == "a_b_c_"
    assert safe_name("aux") == "aux_" and safe_name("NUL.txt") == "NUL.txt_" and safe_name("..") == "_"


def test_the_document_names_the_files_that_call_the_unet():
    calls = re.compile(r"\b(unet|self\.denoiser)\((?!self)")
    files = [ROOT / "local_sd_pipeline.py", *(ROOT / "memorization").rglob("*.py")]
    found = {str(path.relative_to(ROOT)) for path in files if calls.search(path.read_text())}
    paragraph = (ROOT / "docs" / "architecture.md").read_text().split("**The UNet is called**")[1].split("\n\n")[0]
    assert found == set(re.findall(r"`([\w/]+\.py)`", paragraph))


def test_no_engine_names_a_method():
    """But as a default value of ``base`` and the score that others are compared with; studies may."""
    names = "|".join(dict.fromkeys([*DETECTORS, *MITIGATIONS]))
    rooms = [path for room in ("runs", "evaluation", "cli", "index", "similarity", "models", "io") for path in
             (ROOT / "memorization" / room).rglob("*.py")]  # fmt: skip
    named = {str(path.relative_to(ROOT)) for path in [*rooms, *ROOT.glob("*.py")]
             if re.search(rf"""["']({names})["']""", path.read_text())}  # fmt: skip
    assert named == {"memorization/evaluation/learned.py", "memorization/evaluation/report.py"}


def test_an_audit_names_no_signal_and_no_measure():
    names = "|".join([*SIGNALS, *MEASURES])
    files = [*(ROOT / "memorization" / "audit").glob("*.py"), *(ROOT / "memorization" / "report").glob("*.py")]
    assert len(files) > 10 and not [path for path in files if re.search(rf"""["']({names})["']""", path.read_text())]
