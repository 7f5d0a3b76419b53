"""Faults in settings and calibrations: each way in refuses them in one line."""

import json
import math
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import pytest
import yaml
from conftest import GOLDEN
from faults import JSON, ODD, damaged, examples, make_odd, refused, taken_or_refused, within
from hypothesis import given
from hypothesis import strategies as st

from memorization.cli import detect
from memorization.detectors.base import make_detectors
from memorization.evaluation.calibration import read_calibration
from memorization.mitigations.base import MITIGATIONS
from memorization.settings import Bounds, Checked, Count, annotations_of, make

TINY = str(GOLDEN / "tiny-eps")

WRONG = [
    ("sharpness", "method", "exactt"),
    ("sharpness", "step", "0"),
    ("sharpness", "step", "nan"),
    ("anisotropy", "variant", "offical"),
    ("anisotropy", "branch", "epsilonn"),
    ("anisotropy", "cosine", "foo"),
    ("anisotropy", "cosine_mode", "x|x"),
    ("anisotropy", "normalization", "L3"),
    ("anisotropy", "norm_weight", "inf"),
    ("anisotropy", "cosine_weight", "[1"),
    ("anisotropy", "norm_weight", "9" * 5000),
    ("flipd", "probes", "0"),
    ("flipd", "probes", "-1e400"),
    ("p_laplace", "timestep", "-1"),
    ("p_laplace", "timestep", "1000"),
    ("p_laplace", "points", "1.5"),
    ("p_laplace", "points", "{a: b"),
    ("noise_norm", "speed", "3"),
]


def run(prompt_file, detector, *arguments, model=TINY):
    detect.main(["--model", model, "--prompts", str(prompt_file), "--detectors", detector, *arguments])


@pytest.mark.parametrize(("detector", "setting", "value"), WRONG)
def test_by_the_command_line(prompt_file, detector, setting, value):
    refused(lambda: run(prompt_file, detector, "--set", f"{detector}.{setting}={value}"), detector, setting)


@pytest.mark.parametrize(("detector", "setting", "value"), WRONG)
def test_by_a_models_yaml(prompt_file, tmp_path, detector, setting, value):
    path = tmp_path / "mine.yaml"
    path.write_text(json.dumps({"ids": [TINY], "settings": {"detectors": {detector: {setting: value}}}}))
    refused(lambda: run(prompt_file, detector, model=str(path)), detector, setting)


def calibration(path, model=TINY, **entries):
    content = {"model": model, "num_images": 1, "steps": 50, "detectors": entries}
    path.write_text(yaml.safe_dump(content, allow_unicode=True))
    return path


@pytest.mark.parametrize(("detector", "setting", "value"), WRONG)
def test_by_a_calibration(prompt_file, tmp_path, detector, setting, value):
    path = calibration(tmp_path / "c.yaml", **{detector: {"threshold": 1.0, "settings": {setting: value}}})
    refused(lambda: run(prompt_file, detector, "--calibration", str(path)), str(path), detector, setting)


@pytest.mark.parametrize(("detector", "setting", "value"), WRONG)
def test_by_python(detector, setting, value):
    refused(lambda: make_detectors([detector], {detector: {setting: value}}), detector, setting)


@pytest.mark.parametrize("settings", [3, "x", [1], [["variant", "eps"]], {1: 2}, {"": 1}, {"cosine_weight": 10**400}])
def test_by_python_of_another_shape(settings):
    refused(lambda: make_detectors(["anisotropy"], {"anisotropy": settings}), "anisotropy")


@pytest.mark.parametrize("name", list(MITIGATIONS))
@pytest.mark.parametrize("value", [math.nan, math.inf, True, "", [], {}, pytest.param(10**400, id="huge")])
def test_strengths(name, value):
    refused(lambda: MITIGATIONS.make(name, {"strength": value}), name, "strength")


@dataclass(frozen=True)
class Example(Checked):
    rate: Annotated[float, Bounds(0, open=True)] = 1.0
    count: Count = 3
    kind: Literal["exact", "fast"] = "fast"
    target: float | None = None
    on: bool = False
    sizes: tuple[int, ...] = ()
    table: dict[float, float] | None = None
    text: str = ""


@examples(300)
@given(name=st.sampled_from(list(annotations_of(Example))), value=JSON)
def test_any_value_fits_or_is_refused(name, value):
    made = taken_or_refused(lambda: make(Example, {name: value}, "example"))
    if made is not None and name in ("rate", "count", "target") and getattr(made, name) is not None:
        assert math.isfinite(getattr(made, name)) and not isinstance(getattr(made, name), bool)


@examples(100)
@given(values=JSON)
def test_any_table_of_settings_fits_or_is_refused(values):
    taken_or_refused(lambda: make(Example, values, "example"))


def test_numbers_in_text_are_numbers():
    (made,) = make_detectors(["sharpness"], {"sharpness": {"step": "1e-3"}})
    assert made.step == 0.001


WHOLE = {"threshold": 1.0, "levels": {0.5: 1.0}, "bands": {1: [0.0, 1.0], 2: [0.0, 1.0], 4: [0.0, 1.0]}}
DAMAGES: list[tuple[str, Any]] = [
    ("threshold", math.nan),
    ("threshold", math.inf),
    ("threshold", "high"),
    ("threshold", True),
    ("threshold", None),
    ("realised_fpr", math.nan),
    ("levels", {0.5: math.nan}),
    ("levels", {"half": 1.0}),
    ("levels", [0.5]),
    ("bands", {1: [0.0, math.nan]}),
    ("bands", {1: [0.0]}),
    ("bands", {3: [0.0, 1.0]}),
    ("bands", {1: [0.0, 1.0]}),
    ("bands", 3),
    ("settings", {"norm_weight": math.nan}),
    ("settings", {"norm_weight": -math.inf}),
    ("settings", ["norm_weight"]),
]


@pytest.mark.parametrize(("field", "value"), DAMAGES)
def test_damaged_fields_of_a_calibration(tmp_path, field, value):
    path = calibration(tmp_path / "c.yaml", anisotropy={**WHOLE, field: value})
    refused(lambda: read_calibration(path), str(path), "anisotropy", "norm_weight" if field == "settings" and
            isinstance(value, dict) else field)  # fmt: skip


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [*{a}, *{a}, *{a}, *{a}, *{a}, *{a}, *{a}, *{a}, *{a}]\n"
    for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)
CONTENTS = [
    b"", b"- a", b"x", b"detectors: [", b"\xff\xfe", b"detectors: {}", b"[" * 5000, b"detectors: {a: 1}\nmodel: m",
    b"model: m\nnum_images: 0\nsteps: 50\ndetectors: {}", b"model: m\nnum_images: 1\nsteps: nan\ndetectors: {}",
    b"model: m\nnum_images: 1\nsteps: 50\ndetectors: []", b"model: m\nnum_images: 1\nsteps: 50\ndetectors: {a: {}}",
    b"!!python/object/apply:os.system ['true']", BOMB.encode() + b"detectors: *i",
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(CONTENTS)))
def test_what_is_no_calibration(tmp_path, number):
    path = tmp_path / "c.yaml"
    path.write_bytes(CONTENTS[number])
    with within(20):
        refused(lambda: read_calibration(path), str(path))


@pytest.mark.parametrize("kind", [*ODD, "missing"])
def test_a_calibration_that_is_no_file(tmp_path, kind):
    path = make_odd(tmp_path / "c.yaml", kind)
    with within(10):
        refused(lambda: read_calibration(path), "c.yaml")


@examples(150)
@given(data=st.data())
def test_a_damaged_calibration_is_read_or_refused(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "damaged.yaml"
    calibration(path, anisotropy=WHOLE)
    path.write_bytes(damaged(data, path.read_bytes()))
    found = taken_or_refused(lambda: read_calibration(path))
    if found is not None:
        numbers = [*found.thresholds.values(), *(level for of in found.levels.values() for level in of.values())]
        assert all(map(math.isfinite, numbers))
