"""The guard after the picture, in hosts and servers, and its study."""

import importlib.util
import sys
import types
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import GOLDEN, load_tiny
from PIL import Image

from memorization.errors import InputError
from memorization.guard import GuardWarning, Refused, protect
from memorization.guard.attack import attack
from memorization.guard.post_guidance import UNTIL, PostGuidance, pull
from memorization.guard.thresholds import Thresholds
from memorization.index.build import build_index
from memorization.io.pictures import to_tensor
from memorization.models.families.base import discrete_scale
from memorization.similarity.nl2 import normalized_l2
from memorization.studies.guard import parse, table_of

ROOT = GOLDEN.parent.parent
OPTIONS = {"num_inference_steps": 3, "guidance_scale": 3.0, "output_type": "np"}


@pytest.fixture(scope="module")
def pipe():
    return load_tiny("tiny-eps", pictures=True)


def draw(pipe, **options):
    generator = torch.Generator().manual_seed(0)
    return pipe("red kite", generator=generator, num_images_per_prompt=2, **{**OPTIONS, **options}).images


@pytest.fixture(scope="module")
def index(pipe, tmp_path_factory):
    """Random pictures, and the second that the pipeline draws."""
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    pictures = (draw(pipe) * 255).round().astype(np.uint8)
    size = pictures.shape[1:3]
    for number in range(60):
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(folder / f"{number:02d}.png")
    Image.fromarray(pictures[1]).save(folder / "drawn.png")
    return build_index(folder, folder / "index", "pixels", size)


# ---------------------------------------------------------------- after the picture
@pytest.mark.parametrize("kind", ["np", "pt", "pil"])
def test_a_copy_is_found_when_it_is_drawn(pipe, index, kind):
    plain = draw(pipe, output_type=kind)
    with protect(pipe, 1e9, index=index, limit=0.1), pytest.warns(GuardWarning, match="drawn.png: a copy"):
        assert all(np.array_equal(a, b) for a, b in zip(draw(pipe, output_type=kind), plain, strict=True))
    with protect(pipe, 1e9, index=str(index.folder), limit=0.1, on_copy="blank") as guard:
        found = draw(pipe, output_type=kind)
    first, second = guard.verdicts
    assert first.near.measure == second.near.measure == "nl2"
    drawn = to_tensor((draw(pipe) * 255).round().astype(np.uint8))
    nearest = normalized_l2(drawn, index.vectors(slice(None))).amin(1)
    assert first.near.value == pytest.approx(nearest[0].item(), rel=1e-2)
    assert second.near.value == pytest.approx(0, abs=0.02) and Path(second.near.path).name == "drawn.png"
    assert (first.near.is_copy, second.near.is_copy, first.action, second.action) == (False, True, "none", "blank")
    assert np.array_equal(found[0], plain[0]) and not np.array_equal(found[1], plain[1])
    with protect(pipe, 1e9, index=index, limit=0.1, on_copy="refuse"), pytest.raises(Refused, match="picture 1"):
        draw(pipe, output_type=kind)


def test_nl2_needs_neighbours(pipe, index, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "one.png")
    few = build_index(tmp_path, tmp_path / "index", "pixels", (8, 8))
    with pytest.raises(InputError, match="nL2 needs 50"):
        protect(pipe, 1.0, index=few)


# ---------------------------------------------------------------- hosts
class Host:
    """A model patcher as ComfyUI and Forge have it."""

    def __init__(self):
        self.function, self.options = None, {}

    def clone(self):
        return Host()

    def set_model_sampler_post_cfg_function(self, function, **options):
        self.function, self.options = function, options


def step(sigma, difference=2.0, sigmas=None, **more):
    """What a host gives: the first of two pictures is pulled by ``difference``; ``sigmas`` are those of the sampling,
    where it says them."""
    options = {} if sigmas is None else {"transformer_options": {"sample_sigmas": sigmas}}
    uncond = torch.zeros(2, 4, 3, 3)
    cond = uncond + torch.tensor([difference, 0.1]).view(2, 1, 1, 1)
    return {"cond_denoised": cond, "uncond_denoised": uncond, "denoised": 7 * cond, "sigma": torch.tensor([sigma] * 2),
            "input": uncond, "model_options": options, "cond": [], "uncond": [], **more}  # fmt: skip


def test_a_host_is_warned_at_each_first_step_alone():
    said = []
    guard = PostGuidance(1.0, "warn", say=said.append)
    for sigma in (14.6, 5.0, 1.0, 14.6, 5.0):
        args = step(sigma)
        assert guard(args) is args["denoised"]
    assert len(said) == 2 and [verdict.flagged for verdict in guard.verdicts] == [True, False]
    assert guard.verdicts[0].score == 2.0
    guard(step(1.0, difference=50))
    assert guard.verdicts[0].score == 2.0  # later steps are not read
    with pytest.raises(InputError, match="not one of"):
        PostGuidance(1.0, "reseed")


def reads(*calls):
    """At which of the calls a guard reads the score."""
    guard, found = PostGuidance(1e9, say=lambda line: None), []
    for call in calls:
        before = guard.verdicts
        guard(call)
        found.append(guard.verdicts is not before)
    return found


def test_a_generation_begins_with_sigmas_of_its_own():
    """As ComfyUI says them, whatever sigma does in between; a sampling of the same length may begin lower."""
    first, second, third = (torch.tensor(sigmas) for sigmas in ([14.6, 5.0, 0.0], [14.6, 5.0, 0.0], [3.0, 1.0, 0.0]))
    sigmas = [(14.6, first), (14.6, first), (5.0, first), (12.0, first),  # two calls at the first step; a restart
              (14.6, second), (14.6, third), (3.0, third)]  # broken off at once; from a picture  # fmt: skip
    assert reads(*(step(sigma, sigmas=own) for sigma, own in sigmas)) == [1, 0, 0, 0, 1, 1, 0]
    assert reads(step(14.6, sigmas=first), step(5.0, sigmas=first), step(14.6, sigmas=first)) == [1, 0, 1]  # kept
    assert reads(step(5.0, sigmas=first), step(3.0, sigmas=third)) == [1, 1]


@pytest.mark.parametrize(
    ("sigmas", "begins"),
    [
        ([14.6, 14.6, 5.0, 1.0], [1, 0, 0, 0]),  # two calls at the first step
        ([14.6, 5.0, 5.0 * 2**0.5, 1.0, 1.0 * 2**0.5, 0.1], [1, 0, 0, 0, 0, 0]),  # Heun with churn
        ([14.6, 5.0, 0.03, 3.0, 1.0, 14.6], [1, 0, 0, 1, 0, 1]),  # from a picture in between
        ([14.6, 5.0, 14.6, 5.0], [1, 0, 1, 0]),  # broken off
        ([1.0, 0.9, 0.1, 0.6, 0.2], [1, 0, 0, 1, 0]),  # a flow
    ],
)
def test_elsewhere_sigma_tells_where_a_generation_begins(sigmas, begins):
    assert reads(*map(step, sigmas)) == begins


def test_a_generation_that_begins_low_says_so_and_is_not_mitigated():
    said = []
    guard = PostGuidance(1.0, "mitigate", say=said.append)
    args = step(1.5)
    assert guard(args) is args["denoised"]
    (line,) = said
    assert "read at sigma 1.5" in line and "drawn as it is, since it begins below sigma 2.75" in line
    assert guard.verdicts[0].action == "warn" and not guard.verdicts[0].is_safe


def test_what_cannot_be_judged_is_said():
    said = []
    guard = PostGuidance(1.0, "mitigate", say=said.append)
    assert guard(step(14.6, uncond=None)) is not None and torch.equal(guard(step(5.0)), step(5.0)["denoised"])
    assert guard.verdicts == [] and len(said) == 1 and "no unconditional prediction" in said[0]


@pytest.mark.parametrize("difference", [float("nan"), float("inf")])
def test_a_picture_whose_score_is_not_finite_leaves_its_neighbours_judged(difference):
    said = []
    guard = PostGuidance(0.05, "mitigate", say=said.append)
    args = step(14.6, difference=difference)
    found = guard(args)
    assert said[0] == "the guard does not judge picture 0: its score is not finite"
    assert [(verdict.row, verdict.flagged) for verdict in guard.verdicts] == [(1, True)] and len(said) == 2
    assert torch.equal(found[1], args["uncond_denoised"][1])  # mitigated
    assert torch.equal(found[0].isfinite(), args["denoised"][0].isfinite())  # left as it was
    with pytest.raises(Refused, match=r"^picture 1"):
        PostGuidance(0.05, "refuse", say=said.append)(args)


def test_a_host_draws_flagged_pictures_without_guidance_at_first():
    guard = PostGuidance(1.0, "mitigate", say=lambda line: None)
    early, late = step(14.6), step(1.0)
    found = guard(early)
    assert torch.equal(found[0], early["uncond_denoised"][0]) and torch.equal(found[1], early["denoised"][1])
    assert guard(late) is late["denoised"]


def test_a_host_is_refused_and_asked_again():
    guard = PostGuidance(1.0, "refuse")
    for _ in range(2):
        with pytest.raises(Refused, match="picture 0"):
            guard(step(14.6))


def test_the_score_of_hosts_is_that_of_protect(pipe):
    uncond, cond = torch.randn(2, 2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    scale = discrete_scale(pipe.scheduler, 667)
    x = torch.zeros_like(cond)
    assert torch.allclose(pull(scale.x0(cond, x), scale.x0(uncond, x)), scale.pull(uncond, cond), rtol=1e-4)


def test_guidance_acts_in_hosts_from_where_static_transition_lets_it(pipe):
    scale = discrete_scale(pipe.scheduler, 650)
    assert pytest.approx(scale.sigma / scale.alpha, abs=0.01) == UNTIL


def load(path):
    spec = importlib.util.spec_from_file_location(path.parent.name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_node_of_comfyui():
    module = load(ROOT / "examples" / "comfyui_guard" / "__init__.py")
    node = module.NODE_CLASS_MAPPINGS["MemorizationGuard"]
    assert list(node.INPUT_TYPES()["required"]) == ["model", "threshold", "action"]
    host = Host()
    (patched,) = getattr(node(), node.FUNCTION)(host, 1.0, "mitigate")
    assert host.function is None and patched.options == {"disable_cfg1_optimization": True}
    assert torch.equal(patched.function(step(14.6))[0], torch.zeros(4, 3, 3))


def test_the_extension_of_forge(monkeypatch):
    scripts = types.SimpleNamespace(Script=object, AlwaysVisible=object())
    monkeypatch.setitem(sys.modules, "modules", types.SimpleNamespace(scripts=scripts))
    monkeypatch.setitem(sys.modules, "gradio", types.SimpleNamespace())
    module = load(ROOT / "examples" / "forge_guard" / "scripts" / "memorization_guard.py")
    host = Host()
    p = types.SimpleNamespace(sd_model=types.SimpleNamespace(forge_objects=types.SimpleNamespace(unet=host)))
    module.MemorizationGuard().process_before_every_sampling(p, False, 1.0, "warn", x=None)
    assert p.sd_model.forge_objects.unet is host
    module.MemorizationGuard().process_before_every_sampling(p, True, 1.0, "refuse", x=None)
    with pytest.raises(Refused):
        p.sd_model.forge_objects.unet.function(step(14.6))


# ---------------------------------------------------------------- server and demo
def test_the_server_draws_and_refuses(pipe):
    pytest.importorskip("fastapi")
    pytest.importorskip("httpx")
    from fastapi.testclient import TestClient
    from guard_server import server

    options = {**OPTIONS, "output_type": "pil"}
    for threshold, status in ((1e9, 200), (0.0, 451)):
        with protect(pipe, threshold, action="refuse") as guard:
            answer = TestClient(server(pipe, guard, **options)).post("/draw", json={"prompt": "red kite"})
        assert answer.status_code == status
        said = answer.headers["X-Verdict"] if status == 200 else answer.text
        assert said.startswith("picture 0: score")


def test_the_demo_draws(pipe):
    pytest.importorskip("gradio")
    from guard_demo import page

    blocks = page(pipe, 0.0, **{**OPTIONS, "output_type": "pil"})
    (draw_it,) = [one.fn for one in blocks.fns.values()]
    images, said = draw_it("red kite", "blank", 2, 0)
    assert len(images) == 2 and said.count("left blank") == 2
    assert draw_it("red kite", "refuse", 1, 0)[0] == []


# ---------------------------------------------------------------- the study
def test_an_attack_lowers_the_loss_and_stays_below(pipe):
    embeds, noise = pipe.embed(["red kite"]), pipe.pure_noise(1, 0)
    picture = torch.randn(noise.shape, generator=torch.Generator().manual_seed(1))
    scale, empty = discrete_scale(pipe.scheduler, 981), pipe.embed([""])

    def scored(one):
        with torch.no_grad():
            return scale.pull(*(pipe.predict_noise(noise, 981, e) for e in (empty, one))).item()

    threshold = 0.8 * scored(embeds)
    found = attack(pipe, embeds, picture, noise, threshold, 981.0, iterations=8,
                   generator=torch.Generator().manual_seed(0))  # fmt: skip
    assert scored(found) < threshold < scored(embeds)
    assert torch.equal(found[:, 0], embeds[:, 0].float())  # the start token stays


def test_the_table_counts_copies_that_are_handed_out():
    def line(row, kind, nl2, **more):
        return {"row": row, "kind": kind, "family": "f", "nl2": nl2, "moved": 0.0, "seconds": 1.0, **more}

    lines = pd.DataFrame([
        line("none", "memorized", [1.0, 1.0]), line("none", "ordinary", [3.0, 3.0]),
        line("blank 0.1", "memorized", [1.0, 1.0], flagged=[True, False], delivered=[False, True]),
        line("blank 0.1", "ordinary", [3.0, 3.0], flagged=[False, False], delivered=[True, True]),
        line("attack 0.1", "memorized", [1.0, 1.0], flagged=[False, True], delivered=[True, True]),
        line("attack 0.1", "ordinary", [3.0, 3.0], flagged=[False, True], delivered=[True, True]),
    ])  # fmt: skip
    table = table_of(lines, {"nl2": 1.4}, 100).set_index(["row", "kind"])
    assert table.loc[("none", "memorized"), "copies"] == 1
    assert table.loc[("blank 0.1", "memorized"), ["copies", "flagged"]].tolist() == [0.5, 0.5]
    assert table.loc[("attack 0.1", "memorized"), "copies"] == 0.5
    assert np.isnan(table.loc[("blank 0.1", "ordinary"), "copies"]) and ("attack 0.1", "ordinary") not in table.index


def test_flags_of_the_study():
    args = parse(["--rates", "0.02,0.1", "--actions", "reseed"])
    assert (args.rates, args.actions) == ([0.02, 0.1], ["reseed"])
    with pytest.raises(InputError, match="refuse hands out nothing"):
        parse(["--actions", "refuse"])


def test_thresholds_are_plain_yaml(tmp_path):
    holds_for = {"weights": "w", "dtype": "float32", "scheduler": "s", "guidance_scale": 1.0, "timesteps": [981.0],
                 "size": [4, 8, 8]}  # fmt: skip
    known = Thresholds("m", holds_for, 0.5, (1.0, 3.0, 2.0))
    assert known.scores == (3.0, 2.0, 1.0) and known.at(0.5).value == 2.5
    known.save(tmp_path / "t.yaml")
    assert "!!" not in (tmp_path / "t.yaml").read_text()
