"""Re-anchoring, masked padding, deactivated neurons, and what a descent on the embedding may be given."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import load_tiny
from test_mitigations import PROMPTS, case_of

from local_sd_pipeline import NoisePrediction
from memorization.errors import InputError
from memorization.mitigations.anisotropy import Anisotropy
from memorization.mitigations.attention_rescale import RescalingAttnProcessor
from memorization.mitigations.nemo import NeMo, activations, deactivated, refine, select, value_layers
from memorization.mitigations.noise_norm import NoiseNorm
from memorization.mitigations.padding_mask import PaddingMask
from memorization.mitigations.reanchor import Reanchor
from memorization.models.attention import end_of_text
from memorization.models.generation import generate
from memorization.runs.sampling import sample
from optim_utils import descend


@pytest.fixture(scope="module", params=["tiny-eps", "tiny-v"])
def pipe(request):
    return load_tiny(request.param, pictures=True)


# ---------------------------------------------------------------- descent
def test_a_penalty_steers_but_does_not_decide():
    """Down x^2 + y from (2, 2); the penalty pins y, and is counted neither in the losses nor in the target."""
    start = torch.tensor([[2.0, 2.0]])

    def loss(x, rows):
        return x[:, 0] ** 2 + x[:, 1]

    free, pinned = (
        descend(loss, start, lr=0.1, iterations=30, target=4.0, penalty=penalty)
        for penalty in (None, lambda x, rows: 1000 * (x[:, 1] - 2) ** 2)
    )
    assert free.best[0, 1] < 1.8 and pinned.best[0, 1] == pytest.approx(2, abs=0.15)
    assert pinned.losses[0, 0] == 6 and pinned.losses[-1, 0] <= 4  # of x^2 + y alone
    assert pinned.steps[0] > free.steps[0] > 0


def test_the_penalty_keeps_the_embedding_near(pipe):
    case = case_of(pipe)
    target = 0.9 * case.levels["noise_norm"][0.5]
    near, far = (NoiseNorm(target=target, lr=0.02, iterations=60, penalty=w)(case) for w in (300.0, 0.0))
    moved = [(remedy.embeds - case.embeds)[:2].norm().item() for remedy in (near, far)]
    assert 0 < moved[0] < 0.97 * moved[1]
    with torch.no_grad():
        assert (case.score("noise_norm", near.embeds)[:2] <= target + 1e-5).all()


def test_several_noises_are_those_of_the_seed(pipe, monkeypatch):
    case = replace(case_of(pipe), noise=pipe.pure_noise(2, 51), seed=51)
    seen = []
    monkeypatch.setattr(type(case), "score", lambda self, name, embeds: seen.append(self.noise) or embeds.sum((1, 2)))
    Anisotropy(target=-1e9, iterations=1, noises=3)(case)
    assert torch.equal(seen[0], pipe.pure_noise(3, 51)) and torch.equal(seen[0][:2], case.noise)
    Anisotropy(target=-1e9, iterations=1)(case)
    assert torch.equal(seen[-1], case.noise)


# ---------------------------------------------------------------- re-anchoring
def test_a_prompt_whose_embedding_stayed_is_guided_as_ever(pipe):
    case = replace(case_of(pipe), guidance_scale=3.0)
    remedy = Reanchor(target=1e-9, lr=1e-12, iterations=1)(case)
    assert remedy.iterations[0] > 0 and torch.equal(remedy.embeds, case.embeds)
    point = next(generate(pipe, case.embeds[:1], pipe.embed([""]), case.noise[:1])).prediction
    guided = remedy.guide(torch.tensor([0]))(0, point)
    torch.testing.assert_close(guided, point.uncond + 3.0 * point.guidance)


def test_reanchoring_guides_away_from_the_memorized_prompt(pipe):
    case = replace(case_of(pipe), guidance_scale=3.0)
    target = 0.97 * case.score("noise_norm", case.embeds)[0].item()
    remedy = Reanchor(target=target, lr=0.02)(case)
    acts = [steps > 0 for steps in remedy.iterations]
    assert acts[0] and not acts[2] and not remedy.scorable
    rows = torch.tensor([5, 0])  # the second noise of the blank prompt, the first of the first prompt
    latents = pipe.pure_noise(2, 9)
    with torch.no_grad():
        cond = pipe.predict_noise(latents, 401, remedy.embeds[[2, 0]])
        uncond = pipe.predict_noise(latents, 401, pipe.embed([""]).expand(2, -1, -1))
        followed = remedy.guide(rows)(0, NoisePrediction(401, latents, uncond, cond, 0.5, 0.5, "epsilon"))
        anchor = pipe.predict_noise(latents[1:], 401, case.embeds[:1])[0]
    assert torch.allclose(followed[0], uncond[0] + 3 * (cond[0] - uncond[0]), atol=1e-5)
    assert torch.allclose(followed[1], anchor + 3 * (cond[1] - anchor), atol=1e-4)
    assert not torch.allclose(followed[1], uncond[1] + 3 * (cond[1] - uncond[1]), atol=1e-3)


# ---------------------------------------------------------------- padding
def test_a_share_of_the_padding_is_masked_from_the_end(pipe):
    case = case_of(pipe)
    length, ends = case.embeds.shape[1], end_of_text(pipe, PROMPTS).tolist()
    for share in (0.5, 1.0):
        rows = torch.tensor([0, 3, 5])
        with PaddingMask(share)(case).around(rows):
            chosen = next(p for p in pipe.unet.attn_processors.values() if isinstance(p, RescalingAttnProcessor))
        expected = [length - 1 - round(share * (length - 1 - ends[row // 2])) for row in rows.tolist()]
        assert chosen.ends.tolist() == expected and chosen.factor == 1
    with pytest.raises(InputError, match="no number above 0 to 1"):
        PaddingMask(1.5)


def test_masked_padding_is_the_model_without_it(pipe):
    """All of the padding masked: the same pictures as of the embedding cut off after the end of the text."""
    case = case_of(pipe, PROMPTS[:1])
    end = end_of_text(pipe, PROMPTS[:1])[0]
    remedy = PaddingMask(1.0)(case)
    latents, empty = case.noise[:1], pipe.embed([""])
    with torch.no_grad():
        with remedy.around(torch.tensor([0])):
            step = next(generate(pipe, case.embeds, empty, latents, steps=5))
        short = pipe.predict_noise(latents, step.prediction.timestep, case.embeds[:, : end + 1])
        whole = pipe.predict_noise(latents, step.prediction.timestep, case.embeds)
    assert torch.allclose(step.prediction.cond, short, atol=1e-4) and not torch.allclose(whole, short, atol=1e-3)


# ---------------------------------------------------------------- neurons
def test_activations_are_mean_absolute_values(pipe):
    layers, embeds = value_layers(pipe.unet), pipe.embed(PROMPTS[:2])
    found = activations(layers, embeds)
    by_hand = [np.abs(embeds[1].detach().numpy() @ layer.weight.detach().numpy().T).mean(0) for layer in layers]
    assert np.allclose(found[1].detach().numpy(), np.concatenate(by_hand), atol=1e-5)
    names = {id(module): name for name, module in pipe.unet.named_modules()}
    assert layers and all(names[id(layer)].startswith(("down_blocks", "mid_block")) for layer in layers)


def test_neurons_are_silenced_in_their_own_rows_alone(pipe):
    layers, embeds = value_layers(pipe.unet), pipe.embed(PROMPTS[:2])
    width = sum(layer.out_features for layer in layers)
    kept = torch.ones(2, width)
    kept[1, 1] = 0
    plain = layers[0](embeds)
    with deactivated(layers, kept):
        out = layers[0](embeds)
    assert torch.equal(out[0], plain[0]) and (out[1, :, 1] == 0).all() and torch.equal(out[1, :, 2:], plain[1, :, 2:])
    assert torch.equal(layers[0](embeds), plain)  # and are put back


def additive(costs):
    """Every neuron that is on adds its cost."""
    return lambda off: sum(costs) - sum(costs[i] for i in off.tolist())


def test_selection_takes_the_most_excited_and_the_strongest():
    own = torch.tensor([1.0, 9.0, 2.0, 3.0, 4.0])
    excited = torch.tensor([4.9, 0.0, 0.0, 0.0, 1.3])
    costs = [5, 1, 1, 1, 1]
    off, reached = select(additive(costs), own, excited, [3, 2], 4.0)  # theta 4.75, k 1
    assert off.tolist() == [0, 1, 4] and reached == 2
    off, reached = select(additive(costs), own, excited, [3, 2], 8.5)  # none is needed at theta 5, k 0
    assert reached == 2 and off.tolist() == [0, 1, 4]  # 9 is above the bound, so one round more
    off, reached = select(additive(costs), own, excited, [3, 2], -1.0)  # out of reach: everything in the end
    assert off.tolist() == [0, 1, 2, 3, 4] and reached == 0
    assert select(additive(costs), own, excited, [3, 2], 9.0)[0].tolist() == []


def test_refinement_keeps_what_has_to_be_off():
    costs = [5, 1, 4, 1, 1]
    off = torch.tensor([0, 1, 2, 3, 4])
    assert refine(additive(costs), off, [3, 2], 3.0).tolist() == [0, 2]  # the second layer whole, then neuron 1
    assert refine(additive(costs), off, [3, 2], 1.0).tolist() == [0, 1, 2, 3]  # one of the cheap ones, from the end
    assert refine(additive(costs), off, [3, 2], 0.0).tolist() == off.tolist()


@pytest.mark.parametrize("name", ["tiny-eps", "tiny-v"])
def test_nemo_brings_the_norm_of_the_generation_to_the_level(name):
    pipe = load_tiny(name, pictures=True)
    with torch.no_grad():
        for layer in (layer for name, layer in pipe.unet.named_modules() if name.endswith("attn2.to_v")):
            layer.weight *= layer in value_layers(pipe.unet)  # else what lies in the up blocks stays out of reach
        case = case_of(pipe)
        scores = case.score("noise_norm", case.embeds)
    target = 0.9 * scores[0].item()
    remedy = NeMo(target=target)(case)
    assert remedy.iterations[2] == 0 and remedy.iterations[0] > 0 and torch.equal(remedy.embeds, case.embeds)
    empty = pipe.embed([""])
    with torch.no_grad():
        plain = next(generate(pipe, case.embeds[:1], empty, case.noise[:1]))
        with remedy.around(torch.tensor([0])):
            steps = [next(generate(pipe, case.embeds[:1], empty, case.noise[:1]))]
        with remedy.around(torch.tensor([1])):
            steps.append(next(generate(pipe, case.embeds[:1], empty, case.noise[1:])))
    assert not torch.allclose(steps[0].prediction.uncond, plain.prediction.uncond, atol=1e-4)  # in both halves
    norms = [step.prediction.guidance.flatten(1).norm(dim=1).item() for step in steps]
    assert np.mean(norms) <= target * 1.001 < scores[0].item()
    assert sample(case, remedy).shape[:2] == (3, 2)


def test_ordinary_prompts_of_nemo_may_be_given(pipe, tmp_path):
    (tmp_path / "ordinary.txt").write_text("a boat\na clock\nthe harbour at night\n")
    case = case_of(pipe)
    given, drawn = NeMo(reference=tmp_path / "ordinary.txt"), NeMo()
    assert given._ordinary(case) == ["a boat", "a clock", "the harbour at night"]
    assert len(drawn._ordinary(case)) == 256 and drawn._ordinary(case) == drawn._ordinary(case)
    assert given.record()["reference"].startswith("sha256:") and drawn.record()["reference"] is None


def test_nemo_asks_which_neurons_lie_far_from_ordinary_prompts(pipe, tmp_path, monkeypatch):
    import memorization.mitigations.nemo as module

    listed = tmp_path / "list.csv"
    listed.write_text("prompt,label,split\na boat,0,validation\na clock,0,validation\na copy,1,validation\nx,0,test\n")
    seen = []
    monkeypatch.setattr(module, "select", lambda score, own, excited, *rest: seen.append((own, excited)) or select(
        score, own, excited, *rest))  # fmt: skip
    case = case_of(pipe)
    NeMo(target=-1.0, reference=listed)(case)
    usual = activations(value_layers(pipe.unet), pipe.embed(["a boat", "a clock"])).numpy()
    own, excited = (values.numpy() for values in seen[0])
    expected = np.abs(own - usual.mean(0)) / np.maximum(usual.std(0, ddof=1), 1e-12)
    np.testing.assert_allclose(excited, expected, rtol=1e-3)
    listed.write_text("prompt\na boat\n")
    with pytest.raises(InputError, match="two ordinary prompts"):
        NeMo(target=-1.0, reference=listed)(case)
