"""Anti-memorization guidance: every term against its formula, the gate, and what it does to a generation."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import GOLDEN, load_tiny
from PIL import Image

from local_sd_pipeline import NoisePrediction
from memorization.errors import InputError
from memorization.index.build import build_index
from memorization.mitigations.amg import AMG, guide
from memorization.mitigations.amg.guide import AntiMemorization
from memorization.mitigations.amg.nearest import Nearest
from memorization.mitigations.amg.terms import find_terms
from memorization.mitigations.base import make_mitigation
from memorization.mitigations.case import Case, Remedy
from memorization.models.generation import generate
from memorization.runs.sampling import sample
from memorization.similarity.nl2 import normalized_l2

SIZE = (8, 8)
ROOT = GOLDEN.parent.parent


@pytest.fixture(scope="module")
def index_folder(tmp_path_factory):
    """Sixty smooth pictures of 8 x 8, captioned; the first three share their caption."""
    folder = tmp_path_factory.mktemp("training")
    rng = np.random.default_rng(0)
    rows = []
    for i in range(60):
        small = Image.fromarray(rng.integers(0, 256, (2, 2, 3), dtype=np.uint8))
        small.resize(SIZE, Image.Resampling.BICUBIC).save(folder / f"{i:02d}.png")
        rows.append({"file_name": f"{i:02d}.png", "prompt": "same" if i < 3 else f"thing {i}"})
    pd.DataFrame(rows).to_json(folder / "metadata.jsonl", orient="records", lines=True)
    build_index(folder, folder / "index", "pixels", SIZE)
    return folder / "index"


@pytest.fixture(scope="module")
def nearest(index_folder):
    return AMG(index=str(index_folder)).nearest()


def pictures(count=4):
    return torch.rand(count, 3, *SIZE, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 2 - 1


def neighbours_of(nearest, clean):
    """(rows of the neighbours, sigma)."""
    features = nearest.index.describe(clean)
    rows = nearest.find(features.detach())
    return rows, nearest.nearness(features, rows)


def guide_of(nearest, guidances, terms, scale=7.5, every=1):
    """A guide on latents that are the pictures themselves; another caption's eps is its length everywhere."""

    def caption_eps(latents, timestep, captions):
        return torch.tensor([len(caption) for caption in captions])[:, None, None, None].expand_as(latents).to(latents)

    return AntiMemorization(nearest, terms, frozenset(guidances), scale, every, nearest.index.describe, caption_eps)


def point_of(clean, t=500, alpha=0.8):
    """A prediction whose guided eps implies ``clean`` for scale 7.5."""
    generator = torch.Generator().manual_seed(2)
    uncond, cond = (torch.randn(clean.shape, generator=generator).to(clean) for _ in range(2))
    sigma = (1 - alpha**2) ** 0.5
    eps = uncond + 7.5 * (cond - uncond)
    return NoisePrediction(t, alpha * clean + sigma * eps, uncond, cond, alpha, sigma, "epsilon"), eps


def test_nearness_is_the_published_one_and_so_is_its_gradient(nearest):
    x = pictures()
    training = nearest.index.vectors(slice(None)).unflatten(1, (3, *SIZE))
    rows = nearest.find(nearest.index.describe(x))
    sigma = nearest.nearness(nearest.index.describe(x), rows)
    assert torch.allclose(-sigma.float(), normalized_l2(x, training, 50).min(1).values, atol=1e-5)
    assert torch.autograd.gradcheck(lambda p: nearest.nearness(nearest.index.describe(p), rows), x.requires_grad_())


def test_gate_rises_to_its_end_and_strength_moves_it():
    terms = find_terms("paper-main", "nl2")
    assert terms.gate(0) == pytest.approx(1.5) and terms.gate(1000) == pytest.approx(1.95, abs=1e-3)
    assert find_terms("paper-main", "nl2", 1.2).gate(0) == pytest.approx(1.8)
    assert find_terms("paper-main", "nl2", 1.5).gate(1000) == pytest.approx(1.95)  # beyond 2 there would be no gate
    assert find_terms("paper-main", "nl2", gate_start=3.0).gate_start == 3.0
    with pytest.raises(InputError, match="an index of CLIP features needs its own gate"):
        find_terms("paper-main", "clip")
    assert find_terms("paper-main", "clip", gate_start=0.8, gate_end=0.9).gate(0) == pytest.approx(0.9)
    cosine = find_terms("paper-main", "sscd")
    assert cosine.gate(0) == pytest.approx(0.4) and cosine.gate(1000) == pytest.approx(0.3, abs=1e-3)
    assert find_terms("paper-main", "sscd", 2.0).gate(0) == pytest.approx(0.2)
    with pytest.raises(InputError, match="no preset 'official-code' for nl2; there are: paper-main, paper-strong"):
        find_terms("official-code", "nl2")


@pytest.mark.parametrize("preset", ["paper-main", "official-code"])
def test_scales_leave_at_least_one(preset):
    terms = find_terms(preset, "sscd")
    for s0 in (1.0, 3.0, 7.5):
        s1, s2 = terms.scales(torch.linspace(-1, 1, 101), s0)
        assert (s1 >= 0).all() and (s2 >= 0).all() and (s1 + s2 <= s0 - 1 + 1e-6).all()
        assert s1[:50].max() == 0
    s1, s2 = terms.scales(torch.tensor([0.1, 0.6]), 7.5)
    assert s1.tolist() == pytest.approx([1.3, 6.5])
    expected = 2.17 if preset == "paper-main" else 5.2 / 3 * 0.9999
    assert s2.tolist() == pytest.approx([expected, 0], rel=1e-3)


def test_each_guidance_is_its_formula(nearest):
    clean = pictures()
    point, eps = point_of(clean)
    terms = replace(
        find_terms("paper-main", "nl2"), gate_start=9, gate_end=9, c1=1.0, c2=0.5, c3=3.0, sim_above=None, sim_rate=0.0
    )  # always open
    rows, sigma = neighbours_of(nearest, clean)
    m = sigma + 2
    s1 = m.clamp(0, 6.5)
    s2 = torch.minimum((0.5 * m).clamp_min(0), 6.5 - s1)
    lengths = torch.tensor([float(len(nearest.index.captions[i])) for i in rows[:, 0]])
    x = clean.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(nearest.nearness(nearest.index.describe(x), rows).sum(), x)

    def wide(v):
        return v[:, None, None, None]

    expected = {
        "spe": -wide(s1) * point.guidance,
        "dup": -wide(s2) * (wide(lengths) - point.uncond),
        "sim": 3.0 * point.sigma * gradient / point.alpha,
    }
    for name, change in expected.items():
        found = guide_of(nearest, {name}, terms)(0, point) - eps
        if name == "dup":  # without despecification it has all the room
            change = -wide((0.5 * m).clamp(0, 6.5)) * (wide(lengths) - point.uncond)
        assert torch.allclose(found, change, atol=1e-5), name
    together = guide_of(nearest, set(expected), terms)(0, point) - eps
    assert torch.allclose(together, sum(expected.values()), atol=1e-5)


def test_dissimilarity_grows_with_the_excess_and_towards_the_last_step():
    sigma, excess = torch.tensor([0.6, 0.2]), torch.tensor([0.2, -0.2])
    terms = find_terms("official-code", "sscd")  # 100 (sigma - .3) exp((1000 - t) / 170)
    assert terms.sim_weight(sigma, excess, 490).tolist() == pytest.approx([30 * np.exp(3), 0], rel=2e-3)
    terms = find_terms("paper-main", "nl2", c3=2.0, sim_rate=1e-12)
    assert terms.sim_weight(sigma, excess.abs(), 0).tolist() == pytest.approx([0.4, 0.4])
    terms = find_terms("paper-main", "sscd", c3=2.0)
    assert terms.sim_weight(sigma, excess, 300).tolist() == [2.0, 2.0]


def test_a_guided_step_lowers_the_nearness_and_a_closed_row_is_left_alone(nearest):
    training = nearest.index.vectors([5, 9]).unflatten(1, (3, *SIZE)).double()
    clean = torch.cat([training * 0.95, pictures(2)])
    neighbours, before = neighbours_of(nearest, clean)
    point, _ = point_of(clean)
    for guidances in ({"sim"}, {"sim", "spe"}):
        guide = guide_of(nearest, guidances, find_terms("paper-main", "nl2", 0.5, c3=0.5))
        after_eps = guide(0, point)
        look = guide.looks[0]
        assert look.open.tolist() == [True, True, False, False]
        assert torch.equal(after_eps[2:], (point.uncond + 7.5 * point.guidance)[2:])
        if guidances == {"sim"}:
            after = (point.latents - point.sigma * after_eps) / point.alpha
            lowered = nearest.nearness(nearest.index.describe(after), neighbours)
            assert (lowered[:2] < before[:2]).all()


def test_rows_that_are_far_look_again_later(nearest):
    clean = torch.cat([nearest.index.vectors([5]).unflatten(1, (3, *SIZE)).double(), pictures(1)])
    guide = guide_of(nearest, {"sim"}, find_terms("paper-main", "nl2", 0.5, c3=1e-9), every=3)
    for step in range(6):
        guide(step, point_of(clean)[0])
    assert [look.rows.tolist() for look in guide.looks] == [[0, 1], [0], [0], [0, 1], [0], [0]]


def test_despecification_without_a_gate_acts_at_every_step(nearest):
    clean = pictures(2)
    terms = replace(find_terms("paper-main", "nl2", 1e-6), ungated_spe=True)
    guide = guide_of(nearest, {"spe", "sim"}, terms, every=3)
    point, eps = point_of(clean)
    assert all((guide(step, point) - eps).abs().max() > 1e-3 for step in range(3))
    assert not any(look.open.any() for look in guide.looks)


def test_what_is_not_finite_is_not_taken_for_far(nearest):
    point, _ = point_of(pictures(1) * float("nan"))
    with pytest.raises(FloatingPointError, match="NaN"):
        guide_of(nearest, {"sim"}, find_terms("paper-main", "nl2"))(0, point)


def test_duplication_counts_where_the_preset_asks_for_it(nearest):
    clean = nearest.index.vectors([0, 30]).unflatten(1, (3, *SIZE)).double()
    terms = replace(find_terms("paper-main", "nl2", c1=0.1, c2=0.5), min_captions=3)
    guide = guide_of(nearest, {"dup"}, terms)
    guide(0, point_of(clean)[0])
    assert nearest.index.multiplicity(neighbours_of(nearest, clean)[0]) == [3, 1]
    assert (guide.looks[0].s2 > 0).tolist() == [True, False]


class Cosines:
    """An index by cosine of two training pictures, orthogonal; ``often`` says how often a caption comes."""

    measure = "sscd"
    training = torch.eye(8, dtype=torch.float64)[:2]

    def __init__(self):
        self.often = 30
        self.index = SimpleNamespace(
            captions=["one", "another"], multiplicity=lambda rows: [self.often] * len(rows)
        )  # fmt: skip

    def find(self, features):
        return (features @ self.training.T).argsort(1, descending=True)

    def nearness(self, features, rows):
        return (features * self.training[rows[:, 0]]).sum(1)


def unit(x):
    return x.flatten(1) / x.flatten(1).norm(dim=1, keepdim=True)


def picture_at(cosine, other=0.0):
    """A picture whose cosines to the two training pictures are these."""
    rest = (1 - cosine**2 - other**2) ** 0.5
    return torch.tensor([cosine, other, rest, 0, 0, 0, 0, 0], dtype=torch.float64).view(1, 2, 2, 2)


def official(guidances=("spe", "dup", "sim"), **changed):
    """The guide of the preset ``official-code`` by cosines, and the captions that it asks eps of."""
    asked, index = [], Cosines()

    def caption_eps(latents, timestep, captions):
        asked.extend(captions)
        return torch.full_like(latents, 0.01 * len(captions[0]))

    terms = replace(find_terms("official-code", "sscd"), **changed)
    return AntiMemorization(index, terms, frozenset(guidances), 7.5, 3, unit, caption_eps), index, asked


def near_point(clean, t=500, pull=1e-3):
    """A prediction that implies ``clean``, of a small guidance vector: the guidances hardly move it."""
    point, _ = point_of(clean, t)
    point = point._replace(cond=pull * point.cond, uncond=pull * point.uncond)
    eps = point.uncond + 7.5 * point.guidance
    return point._replace(latents=point.alpha * clean + point.sigma * eps), eps


@pytest.mark.parametrize(("cosine", "acts"), [(0.45, True), (0.29, False), (-0.2, False)])
def test_the_gate_of_cosines_opens_above_its_level(cosine, acts):
    guide, _, _ = official(["sim"])
    point, eps = near_point(picture_at(cosine))  # the gate stands at .308
    found = guide(0, point)
    assert guide.looks[0].open.tolist() == [acts] and torch.equal(found, eps) != acts
    assert guide.looks[0].gate == pytest.approx(0.3 + 0.1 * np.exp(-2.5))
    if acts:
        after = (point.latents - point.sigma * (eps + 1e-4 * (found - eps))) / point.alpha
        assert unit(after)[0, 0] < cosine


@pytest.mark.parametrize(("pull", "acts"), [(0.02, True), (0.05, False)])
def test_dissimilarity_of_the_authors_code_goes_by_what_the_others_leave(pull, acts):
    """Similarity, gate and gradient once more at the picture after despecification and deduplication."""
    guide, _, _ = official()
    point, eps = near_point(picture_at(0.45), pull=pull)
    s1 = 13 * 0.45
    s2 = min((6.5 - s1) / 0.3 * 0.45, 6.5 - s1)
    between = eps - s1 * point.guidance - s2 * (0.03 - point.uncond)

    def clean(x_t):
        return (x_t - point.sigma * between) / point.alpha

    x_t = point.latents.clone().requires_grad_()
    sigma = unit(clean(x_t))[0, :2].max()
    (gradient,) = torch.autograd.grad(sigma, x_t)
    assert sigma.item() < 0.4 and (sigma.item() > 0.3 + 0.1 * np.exp(-2.5)) == acts
    weight = 100 * (sigma.item() - 0.3) * np.exp(0.00588 * 500) * acts
    expected = between + weight * point.sigma * gradient
    assert torch.allclose(guide(0, point), expected, rtol=1e-4, atol=1e-6)


def test_deduplication_of_the_authors_code_is_held_for_ten_steps():
    guide, index, asked = official(["dup"])
    far = near_point(picture_at(0.1, 0.2))
    guide(0, far[0])  # a caption that comes often is remembered, but the gate is closed
    assert asked == []
    index.often = 1
    guide(1, near_point(picture_at(0.45))[0])
    assert asked == ["another"]
    for step in range(2, 13):
        found = guide(step, far[0]) - far[1]
        s2 = 6.5 / 0.3 * 0.2 * (step < 11)  # nine more steps, at the nearness of the day
        assert torch.allclose(found, -s2 * (0.07 - far[0].uncond), rtol=1e-3, atol=1e-6), step
    assert asked == ["another"] * 10
    guide(13, near_point(picture_at(0.45))[0])
    assert len(asked) == 11


def test_a_row_whose_deduplication_is_held_is_looked_at_at_every_step():
    guide, _, _ = official(["dup"], ungated_spe=False, hold=4)
    for step, cosine in enumerate((0.45, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1)):
        guide(step, near_point(picture_at(cosine))[0])
    looked = [(look.rows.tolist(), bool(look.s2 > 0)) for look in guide.looks]
    assert looked == [([0], True)] * 4 + [([0], False)] * 2  # then at every third: steps 4 and 7


def test_the_nearness_of_features_is_their_cosine_to_the_nearest(nearest):
    vectors = torch.eye(4)
    index = SimpleNamespace(kind="sscd", vectors=lambda rows: vectors[rows])
    features = torch.tensor([[0.6, 0.8, 0, 0], [0.0, 0.6, 0.0, 0.8]])
    by_cosine = Nearest(index)  # ty: ignore[invalid-argument-type]
    assert by_cosine.nearness(features, torch.tensor([[1, 0], [3, 1]])).tolist() == pytest.approx([0.8, 0.8])
    assert by_cosine.measure == "sscd" and nearest.measure == "nl2"


def test_deduplication_waits_for_a_caption_that_comes_often():
    guide, index, asked = official(["dup"])
    index.often = 20
    guide(0, near_point(picture_at(0.45))[0])
    assert asked == []
    index.often = 21
    guide(1, near_point(picture_at(0.45))[0])
    assert asked == ["one"]


@pytest.fixture(scope="module", params=["tiny-eps", "tiny-v"])
def case(request):
    pipe = load_tiny(request.param, pictures=True)
    prompts = ["a red kite", "two boats"]
    with torch.no_grad():
        return Case(pipe, prompts, pipe.embed(prompts).float(), pipe.pure_noise(2, 0), {}, {}, steps=4)


def test_with_its_gate_closed_it_is_plain_sampling_to_the_bit(case, index_folder):
    plain = sample(case, Remedy.unchanged(case))
    closed = AMG(index=str(index_folder), strength=1e-6)
    assert np.array_equal(sample(case, closed(case)), plain)
    opened = AMG(index=str(index_folder), strength=10.0)
    assert not np.array_equal(sample(case, opened(case)), plain)


def test_its_guide_starts_from_the_guidance_scale_of_the_case(case, index_folder):
    assert AMG(index=str(index_folder)).guide(replace(case, guidance_scale=2.0)).scale == 2


def test_a_row_does_not_depend_on_the_others(case, index_folder, monkeypatch):
    amg = AMG(index=str(index_folder), strength=10.0)
    whole = sample(case, amg(case)).astype(float)
    monkeypatch.setattr(guide, "AT_ONCE", 1)
    assert np.abs(sample(replace(case, batch_size=2), amg(case)) - whole).max() <= 1


def test_what_amg_cannot_do_is_said(case, index_folder):
    for settings, message in (
        ({}, "amg needs an index"),
        ({"index": "nowhere"}, "holds no index"),
        ({"guidances": "spe+magic"}, "no guidance magic; there are: spe, dup, sim"),
        ({"index": str(index_folder), "preset": "mine"}, "no preset 'mine'"),
        ({"index": 3}, "index = 3 is no word"),
        ({"c1": -1}, "c1 = -1 is no number of at least 0"),
    ):
        with pytest.raises(InputError, match=message):
            sample(case, make_mitigation("amg", settings)(case))


def test_features_of_clip_have_a_gradient(index_folder, tmp_path):
    made = build_index(index_folder.parent, tmp_path / "clip", "clip", None, str(ROOT / "testbed/models/clip"))
    nearest = Nearest(made)
    x = pictures(2).float()
    rows, sigma = neighbours_of(nearest, x.requires_grad_())
    (gradient,) = torch.autograd.grad(sigma.sum(), x)
    step = 1e-2 * gradient / gradient.norm()
    with torch.no_grad():
        above, below = (nearest.nearness(nearest.index.describe(x + sign * step), rows).sum() for sign in (1, -1))
    assert (above - below).item() == pytest.approx(2e-2 * gradient.norm().item(), rel=0.05)
    assert torch.allclose(made.vectors([0]).norm(), torch.tensor(1.0)) and nearest.measure == "clip"


def test_an_index_of_latents_needs_no_decoder(index_folder, tmp_path):
    pipe = load_tiny("tiny-eps", pictures=True)
    side = pipe.unet.config.sample_size * pipe.vae_scale_factor
    made = build_index(index_folder.parent, tmp_path / "latents", "latents", (side, side), str(GOLDEN / "tiny-eps"))
    assert made.features.shape == (60, pipe.unet.config.in_channels * pipe.unet.config.sample_size**2)
    prompts = ["a red kite"]
    with torch.no_grad():
        case = Case(pipe, prompts, pipe.embed(prompts).float(), pipe.pure_noise(2, 0), {}, {}, steps=4)
    amg = AMG(index=str(tmp_path / "latents"), strength=10.0, every=1)
    guide = amg.guide(case)
    clean = made.vectors([3, 7]).unflatten(1, case.noise.shape[1:])
    point, _ = point_of(clean.double())
    after_eps = guide(0, point)
    assert guide.looks[0].sigma.tolist() == pytest.approx([0, 0], abs=1e-3)
    rows = made.search(clean.flatten(1), 50)[1]
    assert rows[:, 0].tolist() == [3, 7] and not torch.equal(after_eps, point.uncond + 7.5 * point.guidance)
    pipe.vae = None  # nothing is decoded
    *_, last = generate(pipe, case.embeds.expand(2, -1, -1), pipe.embed([""]), case.noise, steps=4, guide=guide)
    assert last.after.isfinite().all()
    build_index(index_folder.parent, tmp_path / "small", "latents", (8, 8), str(GOLDEN / "tiny-eps"))
    with pytest.raises(InputError, match=r"holds latents of \d+ numbers, the model's have 1024"):
        AMG(index=str(tmp_path / "small")).guide(case)
