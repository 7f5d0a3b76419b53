"""Every mitigation against its formula, on tiny pipelines."""

from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import load_tiny
from diffusers.models.attention_processor import AttnProcessor

from local_sd_pipeline import NoisePrediction
from memorization.detectors.base import make_detectors
from memorization.errors import InputError
from memorization.mitigations.anisotropy import Anisotropy
from memorization.mitigations.attention_rescale import AttentionRescale, RescalingAttnProcessor
from memorization.mitigations.base import MITIGATIONS, make_mitigation
from memorization.mitigations.case import Case, Remedy
from memorization.mitigations.cwr import WordRepetition
from memorization.mitigations.dynamic_transition import DynamicTransition
from memorization.mitigations.gni import EmbeddingNoise
from memorization.mitigations.noise_norm import NoiseNorm
from memorization.mitigations.rewrite import Rewrite, replaceable, word_order
from memorization.mitigations.rna import RandomNumbers
from memorization.mitigations.sail import Sail
from memorization.mitigations.second_look import SecondLook
from memorization.mitigations.static_transition import StaticTransition
from memorization.runs.sampling import sample

PROMPTS = ["a red kite over two boats", "portrait of an old clockmaker", ""]


@pytest.fixture(scope="module", params=["tiny-eps", "tiny-v"])
def pipe(request):
    return load_tiny(request.param, pictures=True)


def case_of(pipe, prompts=PROMPTS, **changed):
    detectors = {d.name: d for d in make_detectors(["anisotropy", "noise_norm", "second_look"], {})}
    with torch.no_grad():
        embeds = pipe.embed(prompts).float()
    case = Case(pipe, prompts, embeds, pipe.pure_noise(2, 1), detectors, {}, steps=5, batch_size=4)
    with torch.no_grad():
        scores = {name: case.score(name, embeds)[:2].min().item() for name in detectors}
    levels = {name: {0.5: 0.9 * score} for name, score in scores.items()}
    return replace(case, **{"levels": levels, **changed})


@pytest.mark.parametrize("name", list(MITIGATIONS))
def test_every_method_gives_what_the_sampler_takes_and_none_looks_at_its_neighbours(pipe, name, pictures_index):
    case = case_of(pipe)
    mitigation = make_mitigation(name, {"index": pictures_index} if name == "amg" else None)
    assert len(mitigation.strengths) == 5
    remedy = mitigation(case)
    assert len(remedy.prompts) == len(remedy.iterations) == 3
    assert remedy.embeds.shape == case.embeds.shape and remedy.latents.shape == (3, *case.noise.shape)
    pictures = sample(case, remedy)
    alone = case_of(pipe, PROMPTS[1:2], levels=case.levels)
    remedy_alone = mitigation(alone)
    assert list(remedy_alone.prompts) == [remedy.prompts[1]]
    assert torch.allclose(remedy_alone.embeds[0], remedy.embeds[1], atol=1e-3)
    difference = np.abs(sample(alone, remedy_alone)[0].astype(int) - pictures[1])
    assert pictures.dtype == np.uint8 and pictures.shape[:2] == (3, 2) and np.percentile(difference, 99) <= 2


def test_an_absolute_target_needs_no_level(pipe):
    case = replace(case_of(pipe), levels={})
    with torch.no_grad():
        before = case.score("noise_norm", case.embeds)
    target = 0.95 * before[:2].min().item()
    remedy = make_mitigation("noise_norm", {"target": target, "lr": 0.02, "iterations": 40})(case)
    with torch.no_grad():
        assert (case.score("noise_norm", remedy.embeds) <= target + 1e-5).all()


@pytest.mark.parametrize("cls", [Anisotropy, NoiseNorm, SecondLook])
def test_descent_brings_the_score_to_the_target(pipe, cls):
    case = case_of(pipe)
    remedy = cls(lr=0.02, iterations=40)(case)
    with torch.no_grad():
        after = case.score(cls.lowers, remedy.embeds)
    assert (after <= case.levels[cls.lowers][0.5] + 1e-5).all()
    assert torch.equal(remedy.embeds[:, 0], case.embeds[:, 0]) and not torch.equal(remedy.embeds, case.embeds)
    assert torch.equal(remedy.embeds[2], case.embeds[2]) and remedy.iterations[2] == 0  # the blank prompt is below it


def test_the_bound_is_the_level_of_the_strength_or_the_target():
    levels = {"noise_norm": {0.25: 1.0, 0.5: 2.0, 0.9: 3.0}, "anisotropy": {0.5: 7.0}}
    assert [NoiseNorm(strength=share).bound(levels) for share in (0.25, 0.5, 0.9)] == [1, 2, 3]
    assert NoiseNorm(strength=0.5, target=0.0).bound(levels) == 0 and Anisotropy().bound(levels) == 7


def test_a_level_that_the_calibration_has_not_is_refused(pipe):
    with pytest.raises(InputError, match=r"no level 0.3 of noise_norm in the calibration \(it holds: 0.5\)"):
        NoiseNorm(strength=0.3)(case_of(pipe))
    with pytest.raises(InputError, match="unknown method nonsense; there are: anisotropy"):
        make_mitigation("nonsense")


def test_sail_lowers_its_loss_by_other_noise(pipe):
    case = case_of(pipe)
    remedy = Sail(iterations=5, alpha=0.0)(case)
    assert not torch.equal(remedy.latents[0], case.noise) and torch.equal(remedy.embeds, case.embeds)
    t = pipe.detection_timesteps()[0]

    def norm(latents):
        with torch.no_grad():
            d = pipe.trace(case.embeds[:1], latents, [t])[t].guidance[0]
            u = d / d.flatten(1).norm(dim=1)[:, None, None, None]
            return pipe.trace(case.embeds[:1], latents + u, [t])[t].guidance[0].flatten(1).norm(dim=1)

    assert (norm(remedy.latents[0]) < norm(case.noise)).all()


class Quadratic:
    """A pipeline whose d under prompt k is (x - m_k)^2 / 2, entry by entry, and whose empty prompt gives 1."""

    def __init__(self, means):
        self.means = means
        self.device = means.device

    prediction_type = "epsilon"

    def noise_scales(self, timestep):
        return 0.1, 0.99

    def embed(self, prompts):
        return torch.zeros(len(prompts), 1, 1)

    def predict_noise(self, latents, timestep, embeds):
        assert timestep == 981
        number = embeds[:, 0, 0].round().long()  # 0 for the empty prompt, k + 1 for prompt k
        shift = torch.cat([latents.new_zeros(1, *latents.shape[1:]), self.means])[number]
        return torch.where((number > 0)[:, None, None, None], 1 + (latents - shift).square() / 2, 1.0)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 3.0])
def test_sail_steps_down_its_own_loss(alpha):
    """Adam's first step goes by the signs of the gradient of |d(x + u)| + alpha |x|, u the unit vector along d(x)."""
    generator = torch.Generator().manual_seed(0)
    means, noise = torch.randn(2, 2, 3, 3, generator=generator), torch.randn(2, 2, 3, 3, generator=generator)
    case = SimpleNamespace(
        pipe=Quadratic(means), prompts=["a", "b"], embeds=torch.tensor([1.0, 2.0])[:, None, None], noise=noise,
        grid=[981], levels={}, batch_size=3,
    )  # fmt: skip

    def loss(x, mean):
        d = (x - mean).square() / 2
        u = (d / d.norm()).detach()
        return (x + u - mean).square().norm() / 2 + alpha * x.norm()

    remedy = Sail(alpha=alpha, target=-1e9, lr=1e-3, iterations=1)(case)
    assert remedy.latents.shape == (2, 2, 2, 3, 3) and remedy.iterations == [1, 1]
    for prompt in range(2):
        for number in range(2):
            x = noise[number].clone().requires_grad_()
            (gradient,) = torch.autograd.grad(loss(x, means[prompt]), x)
            expected = noise[number] - 1e-3 * gradient.sign()
            assert torch.allclose(remedy.latents[prompt, number], expected, atol=1e-5)


def test_sail_goes_on_with_the_rows_that_are_above_the_bound():
    """The first prompt's noise is its own minimum and stays; the second is moved as if it were alone."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1, 2, 3, 3, generator=generator)
    means = torch.cat([noise, torch.randn(1, 2, 3, 3, generator=generator)])

    def remedy(*numbers):
        embeds = torch.tensor([k + 1.0 for k in numbers])[:, None, None]
        case = SimpleNamespace(pipe=Quadratic(means), prompts=["p"] * len(numbers), embeds=embeds, noise=noise,
                               grid=[981], levels={}, batch_size=8)  # fmt: skip
        return Sail(alpha=0.0, target=1.0, iterations=3)(case)

    both, alone = remedy(0, 1), remedy(1)
    assert both.iterations == [0, 3] and torch.equal(both.latents[0], noise)
    assert torch.allclose(both.latents[1], alone.latents[0], atol=1e-5)


def test_sail_stops_at_its_level_and_the_usual_size_of_noise():
    """The bound is the level of |d| plus alpha sqrt(dimension): a start below it stays."""
    x = torch.ones(1, 2, 3, 3)
    case = SimpleNamespace(
        pipe=Quadratic(torch.zeros(1, 2, 3, 3)), prompts=["a"], embeds=torch.ones(1, 1, 1), noise=x, grid=[981],
        levels={}, batch_size=4,
    )  # fmt: skip
    u = 1 / 18**0.5
    norm = (1 + u) ** 2 / 2 * 18**0.5  # of d at x + u; |x| itself is sqrt 18
    assert Sail(alpha=0.5, target=norm + 1e-3, iterations=3)(case).iterations == [0]
    assert Sail(alpha=0.5, target=norm - 1e-3, iterations=3)(case).iterations != [0]


def point(timestep, guidance):
    zero = torch.zeros_like(guidance)
    return NoisePrediction(timestep, zero, zero + 1, zero + 1 + guidance, 0.5, 0.5, "epsilon")


def test_static_transition_guides_late(pipe):
    case = case_of(pipe)
    guide = StaticTransition(650)(case).guide(torch.arange(1))
    d = torch.full((1, 4, 2, 2), 0.5)
    assert torch.equal(guide(0, point(800, d)), torch.ones_like(d))
    assert torch.allclose(guide(1, point(600, d)), 1 + case.guidance_scale * d)
    assert torch.equal(guide(1, point(650, d)), torch.ones_like(d))  # guided below it
    opposite = StaticTransition(650, before=-2)(case).guide(torch.arange(1))
    assert torch.allclose(opposite(0, point(800, d)), 1 - 2 * d)


def test_dynamic_transition_guides_a_row_from_its_own_minimum_on(pipe):
    case = case_of(pipe)
    # Falls, turns and stays above its minimum; only falls; only rises; rises, falls and turns.
    norms = torch.tensor([[5.0, 3, 4, 3.5, 3.2], [5, 4, 3, 2, 1], [1, 2, 3, 4, 5], [1, 3, 2, 4, 1]])
    for patience, first, last in ((1, [0, 0, 1, 1, 1], [0, 0, 0, 1, 1]), (2, [0, 0, 0, 1, 1], [0] * 5),
                                  (3, [0, 0, 0, 0, 1], [0] * 5), (4, [0] * 5, [0] * 5)):  # fmt: skip
        for before in (0.0, 1.0):
            guide = DynamicTransition(patience, before)(case).guide(torch.arange(4))
            for index in range(5):
                d = norms[:, index, None, None, None].expand(4, 1, 1, 1)
                scale = (guide(index, point(900, d)) - 1) / d
                on = [first[index], 0, 0, last[index]]
                assert scale.flatten().tolist() == pytest.approx([case.guidance_scale if x else before for x in on])
    assert DynamicTransition().before == 1 and StaticTransition().before == 0  # the public code's


def test_attention_of_start_token_grows_and_padding_gets_none(pipe, monkeypatch):
    module = next(m for name, m in pipe.unet.named_modules() if name.endswith("attn2"))
    hidden = torch.randn(4, 6, module.to_q.in_features, generator=torch.Generator().manual_seed(0))
    states = pipe.embed(["red kite", "kite"]).repeat(2, 1, 1)
    ends = torch.tensor([3, 2])

    def probabilities(processor):
        """``(2, rows, heads, pixels, tokens)``, by the softmax that the processor's output is made of."""
        seen, bmm = [], torch.bmm
        with monkeypatch.context() as patched, torch.no_grad():
            patched.setattr(torch, "bmm", lambda left, right: seen.append(left) or bmm(left, right))
            processor(module, hidden, encoder_hidden_states=states)
        return seen[-1].unflatten(0, (2, 2, module.heads))

    plain = probabilities(AttnProcessor())
    assert torch.allclose(plain, probabilities(RescalingAttnProcessor(torch.full((2,), 99), 1.0)), atol=1e-5)
    other = probabilities(RescalingAttnProcessor(ends, 2.0))
    assert torch.allclose(plain[0], other[0], atol=1e-5)  # the unconditional half is left alone
    for row, end in enumerate(ends.tolist()):
        assert (other[1, row, ..., end + 1 :] == 0).all()
        kept = plain[1, row, ..., : end + 1] / plain[1, row, ..., : end + 1].sum(-1, keepdim=True)
        assert (other[1, row, ..., 0] > kept[..., 0]).all()  # whatever the sign of its logit
    logits = (other / plain).log()[1, 0, 0, 0, : ends[0] + 1]  # up to a constant: only the start token's moves
    assert torch.allclose(logits[1:], logits[1:2].expand(ends[0]), atol=1e-4)
    with pytest.raises(InputError, match="no number of at least 1"):
        AttentionRescale(0.5)


def test_attention_is_put_back(pipe):
    case = case_of(pipe)
    before = {name: type(p) for name, p in pipe.unet.attn_processors.items()}
    with AttentionRescale()(case).around(torch.arange(2)):
        assert any(isinstance(p, RescalingAttnProcessor) for p in pipe.unet.attn_processors.values())
    assert {name: type(p) for name, p in pipe.unet.attn_processors.items()} == before


def test_perturbations_insert_as_many_words_as_asked(pipe):
    case = case_of(pipe)
    for cls, check in ((RandomNumbers, str.isdigit), (WordRepetition, PROMPTS[0].split().__contains__)):
        words = cls(4)(case).prompts[0].split()
        assert len(words) == 10 and sum(map(check, words)) >= 4
        rest = iter(words)
        assert all(word in rest for word in PROMPTS[0].split())  # the old words in their order
    noise = EmbeddingNoise(0.5)(case).embeds - case.embeds
    assert noise.std().item() == pytest.approx(0.5, rel=0.1)
    assert abs(np.corrcoef(noise[0].flatten(), noise[1].flatten())[0, 1]) < 0.2  # each prompt has noise of its own


def test_words_are_inserted_anywhere():
    places, repeated = set(), set()
    for seed in range(20):
        case = SimpleNamespace(prompts=PROMPTS[:1], seed=seed, embeds=torch.zeros(1, 1, 1), noise=torch.zeros(1, 1),
                               pipe=SimpleNamespace(embed=lambda prompts: torch.zeros(1, 1, 1)))  # fmt: skip
        (prompt,) = RandomNumbers(1)(case).prompts
        places |= {i for i, word in enumerate(prompt.split()) if word.isdigit()}
        words = WordRepetition(1)(case).prompts[0].split()
        repeated |= {word for word in words if words.count(word) == 2}
    assert {0, 6} < places  # before, behind, and between the six words
    assert len(repeated) > 3  # any of them


def test_rewrite_changes_the_most_significant_word_first(pipe):
    case = case_of(pipe)
    assert sorted(word_order(case, PROMPTS[0])) == list(range(6))
    remedy = Rewrite(candidates=4, share=0.2)(case)
    old, new = PROMPTS[0].split(), remedy.prompts[0].split()
    assert len(new) == len(old)  # every word is replaced by a word
    first = next(place for place in word_order(case, PROMPTS[0]) if replaceable(old[place]))
    assert [i for i in range(len(old)) if old[i] != new[i] and old[i] != "a"] in ([], [first])
    with torch.no_grad():
        assert (case.score("anisotropy", remedy.embeds) <= case.score("anisotropy", case.embeds) + 1e-6).all()
    assert remedy.prompts[2] == "" and remedy.iterations[2] == 0


def test_sampling_without_a_remedy_is_plain_generation(pipe):
    case = case_of(pipe)
    plain = sample(case, Remedy.unchanged(case))
    guided = sample(case, Remedy.unchanged(
        case, guide=lambda rows: lambda index, p: p.uncond + case.guidance_scale * p.guidance,
        around=lambda rows: nullcontext(),
    ))  # fmt: skip
    assert np.array_equal(plain, guided)


def test_what_is_sampled_is_the_remedy(pipe):
    """Other noise or another prompt's embedding is to the bit the other's pictures; the scale is the case's."""
    case = case_of(pipe, PROMPTS[:2], guidance_scale=2.0)
    plain = sample(case, Remedy.unchanged(case))
    swapped = sample(case, Remedy.unchanged(case, latents=case.noise.flip(0).expand(2, *case.noise.shape)))
    assert np.abs(swapped[:, ::-1].astype(int) - plain).max() <= 1 and not np.array_equal(swapped, plain)
    other = sample(case, Remedy.unchanged(case, embeds=case.embeds.flip(0)))
    assert np.abs(other[::-1].astype(int) - plain).max() <= 1
    scaled = sample(case, Remedy.unchanged(case, guide=lambda rows: lambda i, p: p.uncond + 2 * p.guidance))
    assert np.array_equal(scaled, plain)
    unguided = sample(case, Remedy.unchanged(case, guide=lambda rows: lambda i, p: p.uncond))
    blank = case_of(pipe, ["", ""])
    assert np.abs(unguided.astype(int) - sample(blank, Remedy.unchanged(blank))).max() <= 1


def test_the_score_of_a_case_is_the_mean_over_its_noises(pipe):
    case = case_of(pipe, PROMPTS[:2])
    with torch.no_grad():
        each = [replace(case, noise=case.noise[i : i + 1]).score("noise_norm", case.embeds) for i in range(2)]
        assert torch.allclose(case.score("noise_norm", case.embeds), torch.stack(each).mean(0), rtol=1e-4)
