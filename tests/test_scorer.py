"""What the scorer hands to detectors: of the trace, of the generation, of its end."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
import torch
from conftest import load_tiny
from PIL import Image

from memorization.detectors.base import GenerationDetector, ImageDetector, PromptDetector
from memorization.models.attention import AttentionRecorder, end_of_text
from memorization.models.decoding import encode
from memorization.models.generation import generate
from memorization.runs.pictures import PictureScorer
from memorization.runs.scorer import Scorer, as_rows

PROMPTS = ["a red kite", "two boats on a hill", ""]
STEPS, NOISES = 4, 2


@dataclass(frozen=True)
class Ending(ImageDetector):
    """First numbers of the clean latents, and eps of them with and without the prompt."""

    name: ClassVar[str] = "ending"
    terms: ClassVar[tuple[str, ...]] = ("ending", "prompted", "empty")

    def __call__(self, clean, predict):
        cond, empty = (predict(clean[:, None], 41, with_prompt)[:, 0, 0, 0, 0] for with_prompt in (True, False))
        return {"ending": clean[:, 0, 0, 0], "prompted": cond, "empty": empty}


@dataclass(frozen=True)
class Way(GenerationDetector):
    """A number of each step's latents, clean latents and next latents, over the steps that it asks for."""

    asked: int = STEPS

    name: ClassVar[str] = "way"
    terms: ClassVar[tuple[str, ...]] = ("way",)
    curves: ClassVar[tuple[str, ...]] = ("before", "clean", "after")

    def reads(self, steps):
        return dict.fromkeys(("way", *self.curves), self.asked)

    def reduce(self, step, predict):
        return torch.stack([x[:, 0, 0, 0] for x in (step.prediction.latents, step.x0, step.after)], dim=1)

    def __call__(self, kept):
        return {"way": kept[-1, :, 2], **dict(zip(self.curves, kept.permute(2, 1, 0), strict=True))}


@dataclass(frozen=True)
class Trace(PromptDetector):
    """The timesteps, alphas and first numbers that it is given."""

    name: ClassVar[str] = "trace"
    steps: ClassVar[tuple[int, ...]] = (1, -1)
    terms: ClassVar[tuple[str, ...]] = ("trace", "first", "last")

    def __call__(self, trace):
        first, last = trace
        values = {"trace": first.alpha, "first": first.timestep, "last": last.timestep}
        return {name: torch.full(first.cond.shape[:2], float(value)) for name, value in values.items()}


@dataclass(frozen=True)
class Ends(GenerationDetector):
    """Where the end of text is taken to be, at the second step, whose attention alone is recorded."""

    name: ClassVar[str] = "ends"
    terms: ClassVar[tuple[str, ...]] = ("ends",)

    def attention_steps(self, steps):
        return [1]

    def reduce(self, step, predict):
        return step.x0.new_zeros(len(step.x0)) if step.attention is None else step.attention.ends.float()

    def __call__(self, kept):
        assert not kept[[0, 2, 3]].any()
        return {"ends": kept[1]}


@pytest.fixture(scope="module", params=["tiny-eps", "tiny-v"])
def pipe(request):
    return load_tiny(request.param, pictures=True)


def scored(pipe, detectors, scale=3.0, **settings):
    common = dict(noises=NOISES, seed=7, steps=STEPS, batch_size=6, guidance_scale=scale)
    return Scorer(pipe, detectors, **common | settings)(PROMPTS)


def way_of(pipe, prompt, noise, scale=3.0):
    """The steps of one row alone."""
    with torch.no_grad():
        latents = pipe.pure_noise(noise + 1, 7)[noise:]
        return list(generate(
            pipe, pipe.embed([prompt]), pipe.embed([""]), latents, steps=STEPS, guidance_scale=scale
        ))  # fmt: skip


def test_a_generation_is_guided_by_the_scale_and_an_image_is_its_end(pipe):
    rows = {scale: scored(pipe, [Ending(), Way()], scale) for scale in (1.0, 3.0)}
    for scale, of_scale in rows.items():
        for prompt, row in list(zip(PROMPTS, of_scale, strict=True))[1:2]:
            for noise in range(NOISES):
                steps = way_of(pipe, prompt, noise, scale)
                first = {"before": [s.prediction.latents for s in steps], "clean": [s.x0 for s in steps],
                         "after": [s.after for s in steps]}  # fmt: skip
                for name, expected in first.items():
                    expected = [x[0, 0, 0, 0].item() for x in expected]
                    assert row[name][noise] == pytest.approx(expected, rel=1e-3, abs=1e-4)
                assert row["ending"][noise] == pytest.approx(row["after"][noise][-1])
                with torch.no_grad():
                    for name, text in (("prompted", prompt), ("empty", "")):
                        eps = pipe.predict_noise(steps[-1].after, 41, pipe.embed([text]))[0, 0, 0, 0].item()
                        assert row[name][noise] == pytest.approx(eps, rel=1e-3, abs=1e-4)
    assert rows[1.0][0]["ending"] != pytest.approx(rows[3.0][0]["ending"], rel=1e-3)


def test_a_picture_is_scored_under_its_own_prompt(pipe, tmp_path):
    side = pipe.unet.config.sample_size * pipe.vae_scale_factor
    picture = np.random.default_rng(0).integers(256, size=(side, side, 3), dtype=np.uint8)
    Image.fromarray(picture).save(tmp_path / "a.png")
    paths, prompts = [str(tmp_path / "a.png")] * 2, [PROMPTS[1], ""]
    written, blank = PictureScorer(pipe, [Ending()], batch_size=4)(paths, prompts)
    clean = encode(pipe, paths[:1])
    with torch.no_grad():
        eps = pipe.predict_noise(clean, 41, pipe.embed(prompts[:1]))[0, 0, 0, 0].item()
    assert written["prompted"] == pytest.approx([eps], rel=1e-3, abs=1e-4)
    assert written["ending"] == blank["ending"] == pytest.approx([clean[0, 0, 0, 0].item()], rel=1e-4)
    assert blank["prompted"] == pytest.approx(blank["empty"]) and written["prompted"] != blank["prompted"]


def test_a_step_holds_the_guess_that_its_guided_prediction_implies(pipe):
    for step in way_of(pipe, PROMPTS[1], 0):
        point = step.prediction
        eps = point.uncond + 3.0 * (point.cond - point.uncond)
        guess = (point.latents - point.sigma * eps) / point.alpha
        assert torch.allclose(step.x0, guess, rtol=1e-3, atol=1e-3 * guess.abs().max().item())


def test_every_row_has_its_own_end_of_text(pipe):
    ends = end_of_text(pipe, PROMPTS).tolist()
    assert len(set(ends)) == 3
    assert [row["ends"] for row in scored(pipe, [Ends()], batch_size=8)] == [[end] * NOISES for end in ends]


def test_no_more_of_a_generation_is_made_than_is_read(pipe):
    calls = []
    with torch.no_grad():
        hook = pipe.unet.register_forward_pre_hook(lambda *_: calls.append(1))
        short = scored(pipe, [Way(2)], batch_size=12)
        hook.remove()
    assert len(calls) == 2  # all rows of a step go together
    whole = scored(pipe, [Way(), Ending()], batch_size=12)
    assert short[0]["after"][0] == pytest.approx(whole[0]["after"][0][:2], rel=1e-3, abs=1e-4)
    assert len(scored(pipe, [Way(2), Ending()])[0]["after"][0]) == STEPS  # an image needs them all


def test_the_trace_is_taken_at_the_places_of_the_grid(pipe):
    (row, *_) = scored(pipe, [Trace()])
    grid = pipe.detection_timesteps(STEPS)
    assert row["first"] == [grid[1]] * NOISES and row["last"] == [grid[-1]] * NOISES
    assert row["trace"] == pytest.approx([pipe.noise_scales(grid[1])[0]] * NOISES, rel=1e-5)


def test_later_noises_are_those_of_a_longer_draw(pipe):
    both, second = (scored(pipe, [Way()], **settings)[1]["way"] for settings in ({}, {"noises": 1, "first_noise": 1}))
    assert second == pytest.approx(both[1:], rel=1e-3, abs=1e-4)


def test_attention_is_that_of_the_conditional_half_and_its_map_that_of_the_end_of_text():
    """Two rows, two heads, four pixels, three tokens: the unconditional half rests on token 0. Two layers, the second
    of one pixel."""
    uncond = torch.tensor([1.0, 0, 0]).expand(2, 2, 4, 3)
    cond = torch.tensor([[0.2, 0.3, 0.5], [0.1, 0.7, 0.2]])[:, None, None].expand(2, 2, 4, 3).clone()
    cond[0, :, 3] = torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])  # the last pixel; the heads differ
    recorder = AttentionRecorder(torch.tensor([2, 1]), (2, 2))
    recorder.sink(torch.cat([uncond, cond]))
    recorder.sink(torch.tensor([1.0, 0, 0]).expand(4, 2, 1, 3))
    tokens, end, _ = recorder.attention()
    assert torch.allclose(tokens[0], torch.tensor([[0.15, 0.35, 0.5], [0.1, 0.7, 0.2]]))
    assert torch.allclose(tokens[1], torch.tensor([1.0, 0, 0]).expand(2, 3))
    assert torch.allclose(end, torch.tensor([[[0.5, 0.5], [0.5, 0.5]], [[0.7, 0.7], [0.7, 0.7]]]) / 2)


def test_the_end_of_text_follows_the_last_token(pipe):
    length = [len(pipe.tokenizer(prompt).input_ids) for prompt in PROMPTS]  # with those of beginning and end
    assert end_of_text(pipe, PROMPTS).tolist() == [n - 1 for n in length]


def test_rows_keep_six_digits():
    assert as_rows({"a": torch.tensor([[1.23456789, 1234567.0]])}, ["p"]) == [{"a": [1.23457, 1234570.0]}]
