"""The shared generation and the detectors that read it."""

import math

import numpy as np
import pytest
import torch
from conftest import load_tiny
from diffusers import DDIMScheduler

from local_sd_pipeline import NoisePrediction
from memorization.detectors.attention_entropy import AttentionEntropy
from memorization.detectors.base import make_detectors
from memorization.detectors.bright_ending import BrightEnding
from memorization.detectors.noise_norm import NoiseNorm
from memorization.detectors.trajectory_norm import TrajectoryNorm
from memorization.detectors.trajectory_z import TrajectoryZ
from memorization.detectors.transition_norm import Transition, transition_point
from memorization.models.attention import Attention, end_of_text
from memorization.models.base import split_able
from memorization.models.generation import Step, generate
from memorization.runs.scorer import Scorer

PROMPTS = ["a cat", "two dogs on a hill", ""]


@pytest.fixture(params=["tiny-eps", "tiny-v"])
def pipe(request):
    return load_tiny(request.param, pictures=True)


def rows_of(pipe):
    return pipe.embed(PROMPTS), pipe.pure_noise(1, 3).expand(len(PROMPTS), -1, -1, -1)


def step(index=0, guidance=None, attention=None):
    uncond = torch.zeros_like(guidance) if guidance is not None else None
    return Step(index, NoisePrediction(1, uncond, uncond, guidance, 0.1, 0.9, "epsilon"), None, None, attention)


def test_it_is_the_generation_of_the_pipeline_itself(pipe):
    """Same latents as diffusers' own ``__call__`` with DDIM on the same grid."""
    embeds, latents = rows_of(pipe)
    with torch.inference_mode():
        *_, last = generate(pipe, embeds, pipe.embed([""]), latents, steps=10)
        before = pipe.scheduler
        pipe.scheduler = DDIMScheduler.from_config(
            before.config, timestep_spacing="leading", steps_offset=1, clip_sample=False
        )
        empty = pipe.embed([""]).expand_as(embeds)
        expected = pipe(
            prompt_embeds=embeds, negative_prompt_embeds=empty, latents=latents, num_inference_steps=10,
            guidance_scale=7.5, output_type="latent",
        ).images  # fmt: skip
        pipe.scheduler = before
    assert torch.allclose(last.after, expected, rtol=1e-3, atol=1e-4)


def test_first_step_is_the_one_step_detector(pipe):
    embeds, latents = rows_of(pipe)
    with torch.inference_mode():
        first = next(generate(pipe, embeds, pipe.embed([""]), latents))
        t = pipe.detection_timesteps()[0]
        trace = pipe.trace(embeds, latents[:1], [t])[t]
    kept = TrajectoryNorm().reduce(first, None)[None]
    assert torch.allclose(
        TrajectoryNorm()(kept)["trajectory_norm_1"], NoiseNorm()([trace])["noise_norm"][:, 0], rtol=1e-4, atol=1e-5
    )


def test_a_blank_prompt_has_no_guidance_though_its_rows_differ_in_the_last_bits(pipe, monkeypatch):
    embeds, latents = rows_of(pipe)
    predict = pipe.predict_noise
    monkeypatch.setattr(pipe, "predict_noise", lambda x, t, e: predict(x, t, e) + 1e-4 * torch.rand(len(x), 1, 1, 1))
    with torch.inference_mode():
        point = next(generate(pipe, embeds, pipe.embed([""]), latents)).prediction
    assert point.guidance[2].abs().max() == 0 and point.guidance[:2].abs().amax((1, 2, 3)).min() > 0


def test_wen_averages_the_first_steps():
    values = TrajectoryNorm()(torch.arange(50.0)[:, None])
    assert {name: value.item() for name, value in values.items()} == {
        "trajectory_norm": 24.5,
        "trajectory_norm_5": 2.0,
        "trajectory_norm_1": 0.0,
    }


def test_recorded_attention_is_a_distribution_and_changes_nothing(pipe):
    embeds, latents = rows_of(pipe)
    processors = dict(pipe.unet.attn_processors)
    with torch.inference_mode():
        plain = next(generate(pipe, embeds, pipe.embed([""]), latents))
        recorded = next(
            generate(pipe, embeds, pipe.embed([""]), latents, ends=end_of_text(pipe, PROMPTS), attention_steps=[0])
        )
    assert torch.allclose(plain.after, recorded.after, atol=1e-4)
    tokens, end, _ = recorded.attention
    layers = sum(".attn2." in name for name in processors)
    assert tokens.shape == (layers, len(PROMPTS), embeds.shape[1])
    assert torch.allclose(tokens.sum(-1), torch.ones(layers, len(PROMPTS)), atol=1e-4)
    assert end.shape == (len(PROMPTS), *latents.shape[-2:]) and (end > 0).all() and (end < 1).all()
    assert {k: type(v) for k, v in pipe.unet.attn_processors.items()} == {k: type(v) for k, v in processors.items()}


def test_rows_do_not_depend_on_one_another(pipe):
    embeds, latents = rows_of(pipe)
    detectors = [TrajectoryNorm(), BrightEnding(), AttentionEntropy()]

    def scores(chosen):
        ends = end_of_text(pipe, [PROMPTS[i] for i in chosen])
        with torch.inference_mode():
            steps = list(
                generate(
                    pipe,
                    embeds[chosen],
                    pipe.embed([""]),
                    latents[chosen],
                    steps=5,
                    ends=ends,
                    attention_steps=range(5),
                )
            )
        return [d(torch.stack([d.reduce(s, None) for s in steps])) for d in detectors]

    for together, alone in zip(scores([0, 1]), scores([1]), strict=True):
        for name in together:
            assert together[name][1].item() == pytest.approx(alone[name][0].item(), rel=1e-4)


def test_bright_ending_is_the_norm_under_the_last_mask():
    guidance = torch.randn(2, 3, 4, 6, 6, generator=torch.Generator().manual_seed(0))  # steps, rows, c, h, w
    mask = torch.rand(3, 6, 6, generator=torch.Generator().manual_seed(1))
    other = torch.rand(3, 6, 6, generator=torch.Generator().manual_seed(2))
    steps = [step(i, guidance[i], Attention(None, m, None)) for i, m in enumerate((other, mask))]
    value = BrightEnding()(torch.stack([BrightEnding().reduce(s, None) for s in steps]))["bright_ending"]
    expected = torch.stack([(guidance[i] * mask[:, None]).flatten(1).norm(dim=1) for i in range(2)]).mean(0)
    assert torch.allclose(value, expected / mask.flatten(1).mean(1))


def test_entropy_of_known_distributions():
    """Uniform over n tokens: log n. All on the start token: 0. The change of the padding's part is added, as its size
    or with its sign."""
    n = 8
    uniform, start = torch.full((4, 1, n), 1 / n), torch.eye(n)[:1].expand(4, 1, n)
    ends = torch.tensor([n // 2])  # half of the tokens are end-of-text and padding
    detector = AttentionEntropy()
    first, last = (detector.reduce(step(attention=Attention(tokens, None, ends)), None) for tokens in (start, uniform))
    values = detector(torch.stack([first] * 4 + [last]))
    assert values["layer_entropy"].item() == 0
    assert values["attention_entropy"].item() == pytest.approx(math.log(n) * 1.5)
    assert values["signed_entropy"].item() == pytest.approx(math.log(n) * 1.5)
    values = detector(torch.stack([last] * 4 + [first]))  # from uniform to none: the padding's part falls
    assert values["layer_entropy"].item() == pytest.approx(math.log(n))
    assert values["attention_entropy"].item() == pytest.approx(math.log(n) / 2)
    assert values["signed_entropy"].item() == pytest.approx(-math.log(n) / 2)


def test_transition_is_the_first_local_minimum():
    """With a higher neighbour on both sides: no step is one from which the norm rises without having fallen."""
    norms = torch.tensor([[5.0, 4, 3, 4, 2], [5, 4, 3, 2, 1], [1, 2, 3, 4, 5], [1, 3, 2, 4, 0]]).T
    assert transition_point(norms).tolist() == [2, 4, 4, 2]
    assert Transition()(norms)["transition_norm"].tolist() == [3, 1, 5, 2]
    assert transition_point(norms[:1]).tolist() == [0] * 4


def test_attention_is_recorded_where_it_is_read():
    assert list(BrightEnding().attention_steps(50)) == [49]
    assert AttentionEntropy().attention_steps(50) == [0, *range(40, 50)]
    assert AttentionEntropy().attention_steps(3) == [0, 2]


def test_layer_entropy_is_that_of_its_layer():
    """Layer i spreads over i + 1 tokens: log (i + 1); the last layer where there are fewer."""
    tokens = torch.stack([torch.tensor([1 / (i + 1)] * (i + 1) + [0.0] * (5 - i)) for i in range(5)])[:, None]
    for layer, spread in ((0, 1), (2, 3), (3, 4), (9, 5)):
        detector = AttentionEntropy(layer=layer)
        kept = detector.reduce(step(attention=Attention(tokens, None, torch.tensor([6]))), None)
        assert detector(kept[None])["layer_entropy"].item() == pytest.approx(math.log(spread), abs=1e-6)
    assert AttentionEntropy().layer == 3


def test_curves_are_the_way_and_the_guess():
    """The first curve is the length of each kept step, the second that of x0_hat."""
    rows = torch.zeros(2, 1, 3, 4)
    point = NoisePrediction(1, rows + 1, rows, rows, 0.1, 0.9, "epsilon")
    steps = [Step(i, point, rows + 5 * (i + 1), rows + 1 + i, None) for i in range(5)]
    detector = TrajectoryZ(every=2)
    curves = detector(torch.stack([detector.reduce(s, None) for s in steps]))
    root = math.sqrt(12)
    assert torch.allclose(curves["update_norm"], root * torch.tensor([[0.0, 2, 4]] * 2))
    assert torch.allclose(curves["x0_norm"], root * torch.tensor([[5.0, 15, 25]] * 2))


def test_all_detectors_together_whatever_the_batch_size():
    pipe = load_tiny("tiny-eps", pictures=True)
    pipe.unet.to(memory_format=torch.contiguous_format)
    made = make_detectors(["all"], {"sharpness": {"method": "exact"}, "p_laplace": {"points": 6}})
    detectors, _ = split_able(pipe, made)

    def score(batch_size):
        scorer = Scorer(pipe, detectors, noises=2, seed=51, steps=12, batch_size=batch_size)
        return scorer(PROMPTS)

    large, small = score(8), score(3)
    names = [name for d in detectors for name in (*d.terms, *getattr(d, "curves", ()))]
    assert list(large[0]) == names
    for a, b in zip(large, small, strict=True):
        for name in names:
            assert np.array(a[name]) == pytest.approx(np.array(b[name]), rel=1e-3, abs=1e-4)
            assert np.array(a[name]).shape[0] == 2
    assert large[2]["trajectory_norm"] == [0, 0]  # the blank prompt
