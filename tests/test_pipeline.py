"""The trace: what goes into every one-step detector."""

import pytest
import torch
from conftest import GOLDEN, PROMPTS, load_tiny
from diffusers import DiffusionPipeline, StableDiffusionPipeline


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_to_eps_inverts_every_prediction_type(kind):
    pipe = load_tiny("tiny-eps")
    pipe.scheduler.register_to_config(prediction_type=kind)
    x0, eps = torch.randn(2, 3, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    for t in (981, 41):
        alpha, sigma = pipe.noise_scales(t)
        latents = alpha * x0 + sigma * eps
        output = {"epsilon": eps, "v_prediction": alpha * eps - sigma * x0, "sample": x0}[kind]
        torch.testing.assert_close(pipe.to_eps(output, latents, t), eps, rtol=1e-4, atol=1e-4)


def test_unknown_prediction_type_is_refused():
    pipe = load_tiny("tiny-eps")
    pipe.scheduler.register_to_config(prediction_type="flow")
    with pytest.raises(ValueError, match="flow"):
        pipe.to_eps(torch.zeros(1), torch.zeros(1), 1)


def test_grid_is_the_papers(tiny_eps):
    grid = tiny_eps.detection_timesteps(50)
    assert (len(grid), grid[0], grid[-3], grid[-1]) == (50, 981, 41, 1)


def test_trace_equals_plain_unet_calls(tiny_eps):
    latents, embeds = tiny_eps.pure_noise(2, 7), tiny_eps.embed(PROMPTS[:2])
    with torch.no_grad():
        point = tiny_eps.trace(embeds, latents, [41], batch_size=3)[41]
        for p in range(2):
            for i in range(2):
                plain = tiny_eps.unet(latents[i : i + 1], 41, encoder_hidden_states=embeds[p : p + 1]).sample[0]
                torch.testing.assert_close(point.cond[p, i], plain, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(point.guidance, point.cond - point.uncond)


def test_trace_depends_on_neither_batch_size_nor_order(tiny_v):
    latents = tiny_v.pure_noise(3, 51)
    with torch.no_grad():
        whole = tiny_v.trace(tiny_v.embed(PROMPTS), latents, [981, 41], batch_size=15)
        split = tiny_v.trace(tiny_v.embed(PROMPTS[::-1]), latents, [981, 41], batch_size=2)
    for t in (981, 41):
        torch.testing.assert_close(whole[t].cond, split[t].cond.flip(0), rtol=1e-4, atol=1e-5)


def test_blank_prompt_has_no_guidance_to_the_bit(tiny_eps):
    with torch.no_grad():
        for prompts in (["", "red kite"], ["red kite", "  ", "a", "b", "c"]):
            point = tiny_eps.trace(tiny_eps.embed(prompts), tiny_eps.pure_noise(2, 1), [981], batch_size=4)[981]
            for i, prompt in enumerate(prompts):
                assert (point.guidance[i] == 0).all() == (not prompt.strip())


def test_unconditional_half_is_computed_once(tiny_eps, monkeypatch):
    rows = []
    forward = tiny_eps.unet.forward
    monkeypatch.setattr(tiny_eps.unet, "forward", lambda x, *a, **k: rows.append(len(x)) or forward(x, *a, **k))
    latents = tiny_eps.pure_noise(2, 0)
    with torch.no_grad():
        uncond = tiny_eps.predict_uncond(latents, [981, 41])
        for _ in range(3):
            tiny_eps.trace(tiny_eps.embed(PROMPTS), latents, [981, 41], uncond, batch_size=10)
    assert sum(rows) == 2 * 2 + 3 * (2 * len(PROMPTS) * 2)


def test_noise_of_an_image_does_not_depend_on_how_many_there_are(tiny_eps):
    many = tiny_eps.pure_noise(4, 51)
    assert torch.equal(many[:1], tiny_eps.pure_noise(1, 51))
    assert torch.equal(many, torch.randn(4, 4, 16, 16, generator=torch.Generator().manual_seed(51)))
    assert not torch.equal(many, tiny_eps.pure_noise(4, 53))


@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 0.05), ("float16", 0.005)])
def test_half_precision_stays_near_float32(tiny_v, dtype, tolerance):
    """Root mean square difference of eps, relative to its own: below 5% in bfloat16, 0.5% in float16."""
    half = load_tiny("tiny-v", dtype)
    latents = tiny_v.pure_noise(2, 51)
    with torch.no_grad():
        expected = tiny_v.trace(tiny_v.embed(PROMPTS), latents, [981, 41])
        found = half.trace(half.embed(PROMPTS), half.pure_noise(2, 51), [981, 41])
    for t in (981, 41):
        assert found[t].cond.dtype == torch.float32
        error = (found[t].cond - expected[t].cond).norm() / expected[t].cond.norm()
        assert 0 < error < tolerance


def test_trace_leaves_nothing_on_another_device():
    pipe = load_tiny("tiny-v").to("meta")
    trace = pipe.trace(pipe.embed(PROMPTS), pipe.pure_noise(2, 51), [981, 41], batch_size=4)
    for point in trace.values():
        assert {point.latents.device.type, point.uncond.device.type, point.cond.device.type} == {"meta"}
        assert point.cond.shape == (len(PROMPTS), 2, 4, 16, 16)


def test_gradients_reach_the_embeddings(tiny_eps):
    embeds = tiny_eps.embed(["red kite"]).detach().requires_grad_()
    tiny_eps.trace(embeds, tiny_eps.pure_noise(1, 0), [981])[981].guidance.norm().backward()
    assert embeds.grad.abs().sum() > 0


def test_works_as_custom_pipeline_and_generates():
    options = {"dtype": torch.float32, "safety_checker": None}
    pipe = DiffusionPipeline.from_pretrained(
        GOLDEN / "tiny-eps",
        custom_pipeline=str(GOLDEN.parent.parent / "local_sd_pipeline.py"),
        trust_remote_code=True,
        **options,
    )
    assert pipe.trace(pipe.embed(["a"]), pipe.pure_noise(1, 0), [41])[41].cond.shape == (1, 1, 4, 16, 16)
    plain = StableDiffusionPipeline.from_pretrained(GOLDEN / "tiny-eps", **options)
    ours = load_tiny("tiny-eps", pictures=True)
    made = [
        p("red kite", num_inference_steps=2, latents=ours.pure_noise(1, 3), output_type="np").images
        for p in (plain, ours)
    ]
    torch.testing.assert_close(*map(torch.tensor, made), rtol=1e-4, atol=1e-4)


def test_what_it_saves_plain_diffusers_loads(tmp_path):
    load_tiny("tiny-eps", pictures=True).save_pretrained(tmp_path)
    assert type(DiffusionPipeline.from_pretrained(tmp_path)) is StableDiffusionPipeline
    assert load_tiny(str(tmp_path)).trace  # and ours still is ours
