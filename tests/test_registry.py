"""Methods by name: built-in ones, and those from outside."""

from dataclasses import dataclass
from importlib.metadata import EntryPoint
from typing import ClassVar

import pytest

import memorization as mem
from memorization import registry
from memorization.detectors.base import DETECTORS, PromptDetector, make_detectors
from memorization.errors import InputError
from memorization.mitigations.base import MITIGATIONS


@dataclass(frozen=True)
class Half(PromptDetector):
    """Half the norm of the guidance vector."""

    factor: float = 0.5

    name: ClassVar[str] = "half"
    steps: ClassVar[tuple[int, ...]] = (0,)
    terms: ClassVar[tuple[str, ...]] = ("half",)

    def __call__(self, trace):
        return {"half": self.factor * trace[0].guidance.flatten(2).norm(dim=2)}


@pytest.fixture
def half(monkeypatch):
    """Registered for one test."""
    monkeypatch.setattr(DETECTORS, "_found", dict(DETECTORS._found))
    return mem.register_detector(Half)


@pytest.mark.parametrize("methods", [DETECTORS, MITIGATIONS])
def test_a_file_has_the_name_that_its_method_has_on_the_command_line(methods):
    for name, cls in methods.items():
        assert cls.name == name and cls.__module__ == f"{methods.package}.{name}"


def test_one_from_outside_is_scored_like_the_others(half, tiny_eps):
    assert list(DETECTORS)[-1] == "half"
    detector, other = make_detectors(["half", "noise_norm"], {"half": {"factor": "0.25"}})
    trace = tiny_eps.trace(tiny_eps.embed(["a kite"]), tiny_eps.pure_noise(2, 0), [981])
    assert detector([trace[981]])["half"].tolist() == (0.25 * other([trace[981]])["noise_norm"]).tolist()
    assert detector.record() == {"factor": 0.25, "terms": ["half"]}
    assert mem.register_detector(Half) is Half  # again, as where a notebook's cell is run twice


def test_names_are_not_given_twice(half):
    with pytest.raises(InputError, match="there is a detector 'noise_norm' already"):
        DETECTORS.register(type("Other", (Half,), {"name": "noise_norm"}))
    with pytest.raises(InputError, match="needs a name"):
        DETECTORS.register(type("Other", (Half,), {"name": ""}))


def test_one_that_an_installed_package_brings(monkeypatch):
    point = EntryPoint("half", "test_registry:Half", DETECTORS.group)
    monkeypatch.setattr(registry, "entry_points", lambda group: [point] if group == DETECTORS.group else [])
    monkeypatch.setattr(DETECTORS, "_found", {})
    assert "half" in list(DETECTORS) and make_detectors(["half"])[0] == Half()
