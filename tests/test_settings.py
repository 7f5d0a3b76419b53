"""Values of settings, from flags, YAML and Python: one check for all of them."""

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import pytest

from memorization.detectors.anisotropy import Anisotropy
from memorization.detectors.base import DETECTORS, make_detectors
from memorization.errors import InputError
from memorization.evaluation.calibration import read_calibration
from memorization.mitigations.amg import AMG
from memorization.mitigations.base import MITIGATIONS, make_mitigation
from memorization.models.spec import find_model, model_names
from memorization.settings import Bounds, Checked, Count, described, make, value_of


@dataclass(frozen=True)
class Example(Checked):
    rate: Annotated[float, Bounds(0, open=True)] = 1.0
    count: Count = 3
    kind: Literal["exact", "fast"] = "fast"
    target: float | None = None
    on: bool = False
    above: float | Literal["gate"] | None = None
    sizes: tuple[int, ...] = ()
    table: dict[str, float] | None = None

    name: ClassVar[str] = "example"


@pytest.mark.parametrize(
    ("setting", "given", "expected"),
    [
        ("rate", "1e-3", 0.001),
        ("rate", 2, 2),
        ("count", "4", 4),
        ("count", 4.0, 4),
        ("kind", "exact", "exact"),
        ("target", "-1", -1),
        ("target", "none", None),
        ("on", "true", True),
        ("above", "gate", "gate"),
        ("above", "0.5", 0.5),
        ("sizes", [1, "2"], (1, 2)),
        ("table", {"a": "1e1"}, {"a": 10.0}),
    ],
)
def test_values_are_read(setting, given, expected):
    found = getattr(make(Example, {setting: given}, "example"), setting)
    assert found == expected and type(found) is type(expected)
    assert getattr(Example(**{setting: given}), setting) == expected  # the same without a name


@pytest.mark.parametrize(
    ("setting", "given", "said"),
    [
        ("rate", 0, "example: rate = 0 is no number above 0"),
        ("rate", "fast", "rate = fast is no number above 0"),
        ("rate", float("nan"), "rate = nan is no number"),
        ("rate", "inf", "rate = inf is no number"),
        ("rate", True, "rate = True is no number"),
        ("count", 1.5, "count = 1.5 is no whole number of at least 1"),
        ("kind", "exakt", "kind = exakt is not one of exact, fast"),
        ("on", "maybe", "on = maybe is no true or false"),
        ("above", "door", "above = door is no number or gate or none"),
        ("sizes", 3, "sizes = 3 is no list"),
        ("speed", 1, "example has no setting 'speed'; it has: rate, count"),
    ],
)
def test_what_makes_no_sense_is_one_clear_line(setting, given, said):
    with pytest.raises(InputError, match=said) as caught:
        make(Example, {setting: given}, "example")
    assert "\n" not in str(caught.value)
    if setting != "speed":
        with pytest.raises(InputError, match=said):
            Example(**{setting: given})


@pytest.mark.parametrize(
    ("name", "settings", "said"),
    [
        ("sharpness", {"method": "exakt"}, "sharpness: method = exakt is not one of exact, difference"),
        ("sharpness", {"step": 0}, "step = 0 is no number above 0"),
        ("anisotropy", {"variant": "offical"}, "variant = offical is not one of official, eps"),
        ("anisotropy", {"cosine": "foo"}, "cosine = foo is not one of pixel, vector"),
        ("anisotropy", {"branch": "epsilonn"}, "branch = epsilonn is not one of auto, epsilon, v"),
        ("anisotropy", {"norm_weight": "inf"}, "norm_weight = inf is no number"),
        ("p_laplace", {"points": "many"}, "points = many is no whole number of at least 1"),
        ("p_laplace", {"timestep": -1}, "timestep = -1 is no whole number from 0 to 999"),
        ("flipd", {"probes": 0}, "probes = 0 is no whole number of at least 1"),
    ],
)
def test_settings_of_detectors(name, settings, said):
    with pytest.raises(InputError, match=said):
        make_detectors([name], {name: settings})


def test_settings_of_mitigations():
    assert make_mitigation("anisotropy", {"target": "-1"}).target == -1
    assert make_mitigation("sail", {"alpha": 0}).alpha == 0
    assert make_mitigation("amg", {"gate_start": "-1", "c1": 0}).gate_start == -1
    assert make_mitigation("sail", {"lr": "1e-3"}).lr == 0.001
    with pytest.raises(InputError, match=r"rna: strength = 2\.5 is no whole number"):
        make_mitigation("rna", {"strength": 2.5})
    with pytest.raises(InputError, match="guidances"):
        AMG(guidances=3)


def test_a_method_made_by_hand_is_checked_too():
    with pytest.raises(InputError, match="anisotropy: variant = offical"):
        Anisotropy(variant="offical")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("ids: [a/b]\nanisotropie: {}", "mine.yaml has no setting 'anisotropie'"),
        ("description: no ids", "mine.yaml: .*ids"),
        ("ids: [a/b]\ndtype: float8", "dtype = float8 is not one of"),
        ("ids: [a/b]\nguidance_scale: high", "guidance_scale = high is no number of at least 0"),
        ("ids: [a/b]\nsettings: {detector: {}}", "settings = .* is no table"),
        ("- a list", "says nothing of a model"),
        ("ids: [", "cannot be read"),
    ],
)
def test_a_models_yaml_is_checked(tmp_path, text, said):
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(InputError, match=said) as caught:
        find_model(str(tmp_path / "mine.yaml"))
    assert "\n" not in str(caught.value)


def test_a_yaml_file_names_things_beside_it(tmp_path):
    (tmp_path / "weights").mkdir()
    (tmp_path / "mine.yaml").write_text(
        "ids: [weights, org/model]\nprompts: {prompts: list.csv}\nguidance_scale: 1e0\n"
        "settings: {detectors: {anisotropy: {cosine_weight: 2}}, mitigations: {sail: {alpha: 0.01}}}\n"
    )
    spec = find_model(str(tmp_path / "mine.yaml"))
    assert spec.name == "mine" and spec.guidance_scale == 1
    assert spec.ids == (str(tmp_path / "weights"), "org/model") and spec.own_list() == tmp_path / "list.csv"
    assert spec.settings_of("detectors", DETECTORS) == {"anisotropy": {"cosine_weight": 2}}


@pytest.mark.parametrize(
    ("kind", "methods", "given", "said"),
    [
        ("detectors", DETECTORS, {"anisotropi": {"norm_weight": 3}}, "unknown detector anisotropi; there are: aniso"),
        ("detectors", DETECTORS, {"sharpness": {"method": "exakt"}}, "model mine: sharpness: method = exakt is not"),
        ("mitigations", MITIGATIONS, {"sail": {"alfa": 1}}, "model mine: sail has no setting 'alfa'"),
    ],
)
def test_settings_of_a_model_are_checked_before_they_are_needed(tmp_path, kind, methods, given, said):
    path = tmp_path / "mine.yaml"
    path.write_text(f"ids: [a/b]\nsettings: {{{kind}: {given}}}\n")
    with pytest.raises(InputError, match=said):
        find_model(str(path)).settings_of(kind, methods)


@pytest.mark.parametrize("name", model_names())
def test_settings_of_known_models_are_those_of_methods(name):
    spec = find_model(name)
    assert spec.settings_of("detectors", DETECTORS) == spec.settings.get("detectors", {})
    assert spec.settings_of("mitigations", MITIGATIONS) == spec.settings.get("mitigations", {})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"threshold": "high"}, "threshold = high is no number"),
        ({"levels": {"half": 1.0}}, "levels = .* is no table"),
        ({"limit": 3}, "noise_norm has no setting 'limit'"),
    ],
)
def test_a_calibration_file_is_checked(tmp_path, change, said):
    entry = {"threshold": 1.0, **change}
    path = tmp_path / "c.yaml"
    path.write_text(f"{{model: m, num_images: 1, steps: 50, detectors: {{noise_norm: {entry}}}}}")
    with pytest.raises(InputError, match=said):
        read_calibration(path)


def test_annotations_are_described():
    assert described(Literal["a", "b"]) == "one of a, b" and described(Annotated[int, Bounds(0, 9)])[-6:] == "0 to 9"
    assert value_of(Any, {"x": 1}, "anything") == {"x": 1}
