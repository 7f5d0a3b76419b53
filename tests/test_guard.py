"""The guard: what it reads, what it changes, and that it changes nothing else."""

import copy

import numpy as np
import pytest
import tiny_families
import torch
import yaml
from conftest import load_tiny
from diffusers import DDIMScheduler, EulerDiscreteScheduler
from scipy.stats import binom

import memorization as mem
from local_sd_pipeline import Scale
from memorization.cli.calibrate import main as calibrate_command
from memorization.detectors.noise_norm import NoiseNorm
from memorization.errors import InputError
from memorization.evaluation.intervals import share_interval
from memorization.guard import GuardWarning, Refused, calibrate, protect
from memorization.guard.thresholds import read_thresholds
from memorization.guard.verdict import Verdict
from memorization.models.families.base import discrete_scale

NEVER = 1e9
PROMPTS = ["red kite", "a harbour at dusk with two boats"]
WORDS = ["crab", "tree", "house", "street", "blue", "boat", "lamp"]
ORDINARY = [" ".join(f"{word}{i}{j}" for j in range(3)) for i in range(3) for word in WORDS]


@pytest.fixture(scope="module")
def pipe():
    return load_tiny("tiny-eps", pictures=True)


@pytest.fixture(scope="module", params=["eps", "v", "sdxl", "sd3"])
def any_pipe(request):
    if request.param in ("eps", "v"):
        return load_tiny(f"tiny-{request.param}", pictures=True)
    return getattr(tiny_families, request.param)()


def draw(pipe, **options):
    options = {"prompt": PROMPTS, "num_images_per_prompt": 2, "num_inference_steps": 3, "guidance_scale": 3.0,
               "output_type": "np", "height": 32, "width": 32, **options}  # fmt: skip
    return pipe(generator=torch.Generator().manual_seed(0), **options).images


def scores_of(pipe, **options):
    with protect(pipe, NEVER) as guard:
        draw(pipe, **options)
    return [verdict.score for verdict in guard.verdicts]


@pytest.fixture(scope="module")
def plain(pipe):
    """What it draws unguarded, as latents, and a threshold that flags two of them."""
    return draw(pipe, output_type="latent"), between(scores_of(pipe))


def between(scores):
    """A threshold that flags two of four."""
    low, high = sorted(scores)[1:3]
    return (low + high) / 2


def same(left, right):
    return [bool((a == b).all()) for a, b in zip(left, right, strict=True)]


# ---------------------------------------------------------------- nothing flagged, nothing changed
@pytest.fixture(scope="module")
def any_plain(any_pipe):
    return draw(any_pipe)


def test_unflagged_and_released_pictures_are_the_same_to_the_bit(any_pipe, any_plain):
    plain = any_plain
    with protect(any_pipe, NEVER, action=("reseed", "refuse")) as guard:
        assert all(same(draw(any_pipe), plain))
    assert [verdict.flagged for verdict in guard.verdicts] == [False] * 4
    assert [verdict.extra_calls for verdict in guard.verdicts] == [0] * 4
    assert [verdict.prompt for verdict in guard.verdicts] == [PROMPTS[0]] * 2 + [PROMPTS[1]] * 2
    assert all(same(draw(any_pipe), plain))


def test_only_flagged_rows_change(any_pipe, any_plain):
    with protect(any_pipe, between(scores_of(any_pipe)), action="blank") as guard:
        kept = same(draw(any_pipe), any_plain)
    assert kept == [not verdict.flagged for verdict in guard.verdicts] and sum(kept) == 2


def test_release_leaves_no_trace(pipe):
    before = {name: set(vars(part)) for name, part in parts(pipe).items()}
    guard = protect(pipe, NEVER)
    assert {name: set(vars(part)) for name, part in parts(pipe).items()} != before
    guard.release()
    assert {name: set(vars(part)) for name, part in parts(pipe).items()} == before
    assert not pipe.unet._forward_hooks


def parts(pipe):
    return {"pipe": pipe, "scheduler": pipe.scheduler, "processor": pipe.image_processor}


def test_it_goes_with_callbacks_and_one_guard_a_pipeline(pipe):
    seen = []

    def callback(pipe, step, timestep, kwargs):
        seen.append(timestep.item())
        return kwargs

    with mem.protect(pipe, NEVER):
        draw(pipe, callback_on_step_end=callback)
        with pytest.raises(InputError, match="protected already"):
            protect(pipe, NEVER)
    assert len(seen) == 3


def test_schedulers_of_every_kind_go_on_as_they_are(pipe):
    own = pipe.scheduler
    try:
        for cls in [one for one in own.compatibles if one.__name__ in (
            "EulerAncestralDiscreteScheduler", "DPMSolverMultistepScheduler", "PNDMScheduler", "HeunDiscreteScheduler",
        )]:  # fmt: skip
            pipe.scheduler = cls.from_config(own.config)
            many = cls.__name__ == "PNDMScheduler"  # which takes no fewer
            steps = {"num_inference_steps": 6 if many else 3, "output_type": "latent"}
            plain, threshold = draw(pipe, **steps), between(scores_of(pipe, **steps))
            with protect(pipe, threshold, action="reseed", tries=8) as guard:
                kept = same(draw(pipe, **steps), plain)
            moved = [verdict.score_after is not None for verdict in guard.verdicts]
            assert kept == [not one for one in moved] and any(moved), cls
    finally:
        pipe.scheduler = own


def test_a_compiled_denoiser_is_guarded(pipe, plain):
    (plain, threshold), unet = plain, pipe.unet
    pipe.unet = torch.compile(unet)
    try:
        with torch.compiler.set_stance("force_eager"):  # where the hooks lie is tested, not the compiler
            assert all(same(draw(pipe, output_type="latent"), plain))
            with protect(pipe, threshold, action="blank") as guard:
                kept = same(draw(pipe, output_type="latent"), plain)
        assert kept == [not verdict.flagged for verdict in guard.verdicts] and sum(kept) == 2
    finally:
        pipe.unet = unet


# ---------------------------------------------------------------- the score
@pytest.mark.parametrize("name", ["tiny-eps", "tiny-v"])
def test_the_score_is_the_norm_of_wen_times_a_constant(name):
    pipe = load_tiny(name, pictures=True)
    latents = pipe.pure_noise(1, 3)
    with protect(pipe, NEVER) as guard:
        draw(pipe, prompt=["red kite"], num_images_per_prompt=1, num_inference_steps=50, latents=latents, height=None,
             width=None)  # fmt: skip
    norm = NoiseNorm()([pipe.trace(pipe.embed(["red kite"]), latents, [981])[981]])["noise_norm"].item()
    scale = discrete_scale(pipe.scheduler, 981)
    assert scale.norm_of(guard.verdicts[0].score, latents.numel()) == pytest.approx(norm, rel=1e-4)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample", "flow"])
def test_conversions_recover_x0_and_eps(kind):
    sigma = 0.6
    alpha = 1 - sigma if kind == "flow" else 0.8
    x0, eps = torch.randn(2, 1, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    outputs = {"epsilon": eps, "v_prediction": alpha * eps - sigma * x0, "sample": x0, "flow": eps - x0}
    scale, x, output = Scale(kind, alpha, sigma), alpha * x0 + sigma * eps, outputs[kind]
    assert torch.allclose(scale.x0(output, x), x0, atol=1e-5) and torch.allclose(scale.eps(output, x), eps, atol=1e-5)
    assert torch.allclose(scale.output(eps, x), output, atol=1e-5)
    other = outputs[kind] + 1
    expected = (scale.x0(other, x) - x0).square().mean().sqrt().item()
    assert scale.pull(output, other).item() == pytest.approx(expected, rel=1e-4)


def test_a_flow_pulls_at_its_first_step_where_eps_says_nothing():
    scale, outputs = Scale("flow", 0.0, 1.0), torch.ones(2, 1, 4, 2, 2)
    assert scale.pull(outputs[0], 3 * outputs[1]).item() == 2


def test_between_timesteps_the_scale_is_that_of_the_scheduler(pipe):
    euler = EulerDiscreteScheduler.from_config(pipe.scheduler.config, timestep_spacing="linspace")
    euler.set_timesteps(7)
    for timestep, sigma in zip(euler.timesteps.tolist(), euler.sigmas.tolist(), strict=False):
        scale = discrete_scale(euler, timestep)
        assert scale.sigma / scale.alpha == pytest.approx(sigma, rel=2e-2)


def test_without_guidance_and_with_a_negative_prompt_the_score_costs_a_call(any_pipe):
    usual = scores_of(any_pipe)
    for options in ({"guidance_scale": 1.0}, {"negative_prompt": ["ugly"] * 2}):
        with protect(any_pipe, NEVER) as guard:
            draw(any_pipe, **options)
        assert [verdict.extra_calls for verdict in guard.verdicts] == [1] * 4
        assert [verdict.score for verdict in guard.verdicts] == pytest.approx(usual, rel=1e-3)


def test_several_steps_are_averaged(pipe):
    with protect(pipe, NEVER, steps=2) as guard:
        draw(pipe)
        pulls = torch.stack(guard.generation.pulls)
    assert [verdict.score for verdict in guard.verdicts] == pytest.approx(pulls.mean(0).tolist(), rel=1e-4)
    assert guard.verdicts[0].score != pytest.approx(pulls[0, 0].item(), rel=1e-3)


# ---------------------------------------------------------------- actions
def test_warn_draws_and_says_so(pipe, plain):
    with protect(pipe, 0), pytest.warns(GuardWarning, match="drawn as it is"):
        assert all(same(draw(pipe, output_type="latent"), plain[0]))


@pytest.mark.parametrize("scheduler", [DDIMScheduler, EulerDiscreteScheduler])
def test_reseed_is_drawing_from_that_noise(scheduler):
    """The picture is the one that the pipeline makes of the chosen noise."""
    pipe = load_tiny("tiny-eps", pictures=True)
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    options = {"prompt": "red kite", "num_images_per_prompt": 1}
    (score,) = scores_of(pipe, **options)
    with protect(pipe, score, action="reseed", tries=20, generator=torch.Generator().manual_seed(4)) as guard:
        picture = draw(pipe, **options)
    (verdict,) = guard.verdicts
    noises = torch.Generator().manual_seed(4)
    for _ in range(int(verdict.done.split()[1])):
        noise = torch.randn(1, 4, *(side // pipe.vae_scale_factor for side in (32, 32)), generator=noises)
    assert np.abs(draw(pipe, latents=noise, **options) - picture).max() < 1e-4
    assert scores_of(pipe, latents=noise, **options)[0] == pytest.approx(verdict.score_after, rel=1e-4)
    assert verdict.is_safe and verdict.score_after < score


def test_reseed_keeps_the_lowest_where_none_is_low_enough(pipe, plain):
    with protect(pipe, 0, action="reseed", tries=1) as guard:
        kept = same(draw(pipe, output_type="latent"), plain[0])
    for verdict, stayed in zip(guard.verdicts, kept, strict=True):
        assert not verdict.is_safe and stayed == (verdict.score_after is None)
        assert stayed or verdict.score_after < verdict.score


def test_actions_follow_one_another(pipe):
    with protect(pipe, 0, action=("reseed", "blank"), tries=1) as guard:
        draw(pipe)
    assert {verdict.action for verdict in guard.verdicts} == {"blank"}
    assert all("noise" in verdict.done and "left blank" in verdict.done for verdict in guard.verdicts)


def test_refuse_says_which_and_why(pipe, plain):
    with protect(pipe, plain[1], action="refuse") as guard, pytest.raises(Refused) as refused:
        draw(pipe)
    assert [verdict.action for verdict in guard.verdicts].count("refuse") == 2
    assert len(refused.value.verdicts) == 2 and "given by the caller" in str(refused.value)
    draw(pipe)  # the next call is a new generation


@pytest.mark.parametrize("kind", ["np", "pt", "pil", "latent"])
def test_blank_pictures_of_every_kind(pipe, kind):
    with protect(pipe, 0, action="blank"):
        found = draw(pipe, output_type=kind)
    pictures = [np.asarray(picture, dtype=np.float32) for picture in found]
    if kind == "latent":
        assert not np.any(pictures)
    else:
        top = 255 if kind == "pil" else 1
        assert all(picture.max() == top and (picture == top).mean() > 0.4 for picture in pictures)


@pytest.mark.parametrize(
    ("method", "settings"),
    [("noise_norm", {"target": 1, "iterations": 4}), ("sail", {"target": 1, "iterations": 4}), ("gni", {}),
     ("rna", {}), ("static_transition", {}), ("dynamic_transition", {}), ("attention_rescale", {})],
)  # fmt: skip
def test_mitigate_acts_on_flagged_rows_alone(pipe, plain, method, settings):
    plain, threshold = plain
    with protect(pipe, threshold, action="mitigate", mitigation=method, settings=settings) as guard:
        kept = same(draw(pipe, output_type="latent"), plain)
    assert kept == [not verdict.flagged for verdict in guard.verdicts] and sum(kept) == 2
    if settings:
        assert all(verdict.score_after < verdict.score for verdict in guard.verdicts if verdict.flagged)


def test_a_guide_is_followed_whatever_the_pipeline_makes_of_guidance(pipe):
    """No guidance at any step, at the scale 0 before the point: the unconditional picture."""
    options = {"prompt": "red kite", "num_images_per_prompt": 1, "latents": pipe.pure_noise(1, 2), "height": None,
               "width": None}  # fmt: skip
    settings = {"strength": 0}
    with protect(pipe, 0, action="mitigate", mitigation="static_transition", settings=settings):
        picture = draw(pipe, **options)
    assert np.abs(draw(pipe, **{**options, "prompt": ""}) - picture).max() < 1e-4


def test_what_cannot_be_asked_for_is_said_in_one_line(pipe):
    sd3 = tiny_families.sd3()
    for arguments, words in (
        ({"action": "stop"}, "not one of warn"), ({"action": ()}, "not one of"), ({"on_copy": "reseed"}, "on_copy"),
        ({"steps": 2, "action": "reseed"}, "first step"), ({"fpr": 0.1}, "goes with a file"), ({"tries": 0}, "tries"),
        ({"action": "mitigate"}, "no level"), ({"limit": 1.0}, "needs an index"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=words):
            protect(pipe, 1.0, **arguments)
    with pytest.raises(InputError, match="know no sd3"):
        protect(sd3, 1.0, action="mitigate")
    with pytest.raises(InputError, match="no pipeline that is known"):
        protect(DDIMScheduler(), 1.0)
    with pytest.raises(InputError, match="cannot watch the family pixart"):
        protect(tiny_families.pixart(), 1.0)
    assert not pipe.unet._forward_hooks


def test_a_scheduler_that_was_replaced_is_refused(pipe):
    own = pipe.scheduler
    for drawn_before in (False, True):
        with protect(pipe, NEVER):
            if drawn_before:
                draw(pipe)
            pipe.scheduler = EulerDiscreteScheduler.from_config(own.config)
            try:
                with pytest.raises(InputError, match="scheduler or denoiser was replaced"):
                    draw(pipe)
            finally:
                pipe.scheduler = own


def test_a_denoiser_that_was_replaced_is_refused(pipe):
    own = pipe.unet
    with protect(pipe, NEVER):
        pipe.unet = copy.deepcopy(own)
        try:
            with pytest.raises(InputError, match="scheduler or denoiser was replaced"):
                draw(pipe)
        finally:
            pipe.unet = own


def test_a_generation_of_fewer_steps_than_are_read_is_refused(pipe):
    with protect(pipe, NEVER, steps=5), pytest.raises(InputError, match="reads 5 steps, and the generation has 3"):
        pipe("a boat", num_inference_steps=3)


def test_a_verdict_is_safe_where_the_picture_that_is_handed_out_is():
    def verdict(**changed):
        return Verdict(0, 2.0, 1.0, "given", flagged=True, **changed)

    assert not verdict().is_safe and not verdict(action="warn").is_safe
    assert not verdict(action="reseed", score_after=1.5).is_safe and verdict(action="reseed", score_after=0.5).is_safe
    assert verdict(action="mitigate").is_safe and not verdict(action="mitigate", score_after=1.5).is_safe
    assert verdict(action="blank").is_safe and Verdict(0, 0.5, 1.0, "given").is_safe


# ---------------------------------------------------------------- thresholds
def calibrated(pipe, **options):
    return calibrate(pipe, ORDINARY, **{"fpr": 0.1, "num_inference_steps": 3, "guidance_scale": 3.0, "height": 32,
                                        "width": 32, **options})  # fmt: skip


def test_thresholds_are_of_the_pipelines_own_scores(any_pipe, tmp_path):
    known = calibrated(any_pipe, batch_size=21)
    noise = torch.Generator().manual_seed(51)
    with protect(any_pipe, NEVER) as guard:
        any_pipe(ORDINARY, generator=noise, num_inference_steps=3, guidance_scale=3.0, height=32,
                 width=32, output_type="latent")  # fmt: skip
    scores = sorted((verdict.score for verdict in guard.verdicts), reverse=True)
    assert list(known.scores) == pytest.approx(scores, rel=1e-5)
    assert known.at(0.1).value == pytest.approx((scores[1] + scores[2]) / 2, rel=1e-4)  # 2 of 21 may be flagged
    known.save(tmp_path / "t.yaml")
    assert read_thresholds(tmp_path / "t.yaml") == known
    with protect(any_pipe, tmp_path / "t.yaml", fpr=0.05) as guard:
        draw(any_pipe)
    assert guard.verdicts[0].threshold == pytest.approx((scores[0] + scores[1]) / 2, rel=1e-4)
    assert "of 21 ordinary prompts" in guard.verdicts[0].source


def test_thresholds_are_refused_for_anything_else(pipe, tmp_path):
    known = calibrated(pipe)
    for options, words in (({"guidance_scale": 4.0}, "guidance_scale = 3.0"), ({"num_inference_steps": 5}, "timesteps"),
                           ({"height": 64}, "size")):  # fmt: skip
        with protect(pipe, known), pytest.raises(InputError, match=words):
            draw(pipe, **options)
    with pytest.raises(InputError, match="scheduler = DDIMScheduler"):
        protect(load_tiny("tiny-v", pictures=True), known)
    other = load_tiny("tiny-eps", pictures=True)
    with torch.no_grad():
        other.unet.conv_out.bias[0] += 1e-3
    with pytest.raises(InputError, match="weights"):
        protect(other, known)
    with pytest.raises(InputError, match="dtype = float32, here is bfloat16"):
        protect(load_tiny("tiny-eps", "bfloat16", pictures=True), known)
    own = pipe.scheduler
    pipe.scheduler = EulerDiscreteScheduler.from_config(own.config)
    try:
        with pytest.raises(InputError, match="scheduler = DDIMScheduler"):
            protect(pipe, known)
    finally:
        pipe.scheduler = own
    with pytest.raises(InputError, match="1 steps, not 2"):
        protect(pipe, known, steps=2)


def test_pictures_of_a_prompt_count_once(pipe):
    assert calibrated(pipe, num_images_per_prompt=3) == calibrated(pipe)


def test_too_few_prompts_for_a_rate_are_refused(pipe):
    with pytest.raises(InputError, match="needs 100 ordinary prompts, here are 21"):
        calibrated(pipe, fpr=0.01)


def test_near_copies_are_left_out(pipe):
    known = calibrate(pipe, [*ORDINARY, *ORDINARY[:5]], fpr=0.1, num_inference_steps=3, height=32, width=32)
    assert (len(known.scores), known.left_out) == (21, 5)


def test_mitigations_aim_at_the_levels_of_the_file(pipe):
    known = calibrated(pipe)
    with protect(pipe, known, fpr=0.9, action="mitigate") as guard:  # to the median
        draw(pipe)
    after = [verdict.score_after for verdict in guard.verdicts if verdict.flagged]
    assert after and all(score <= known.levels[0.5] * 1.02 for score in after)


@pytest.mark.parametrize(("count", "total"), [(0, 40), (3, 100), (40, 40)])
def test_rate_intervals_are_those_of_the_binomial(count, total):
    _, low, high = share_interval(count, total)
    if count:
        assert binom.sf(count - 1, total, low) == pytest.approx(0.025, rel=1e-6)
    if count < total:
        assert binom.cdf(count, total, high) == pytest.approx(0.025, rel=1e-6)
    assert (low == 0) == (count == 0) and (high == 1) == (count == total)


def test_adapters_beside_the_weights_do_not_count(pipe):
    from memorization.guard.thresholds import weights_of

    layer = torch.nn.Linear(4, 4)
    adapted = torch.nn.Module()
    adapted.add_module("layer", torch.nn.Module())
    adapted.layer.base_layer = layer
    adapted.layer.lora_A = torch.nn.Linear(4, 2)
    plain = torch.nn.Module()
    plain.layer = layer
    assert weights_of(adapted) == weights_of(plain)
    with torch.no_grad():
        layer.weight[0, 0] += 1
    assert weights_of(plain) != weights_of(pipe.unet)


def test_damaged_files_are_said_in_one_line(tmp_path, pipe):
    path = tmp_path / "t.yaml"
    calibrated(pipe).save(path)
    content = yaml.safe_load(path.read_text())
    for change, words in (
        ({"fpr": 2}, "fpr"), ({"scores": ["x"]}, "scores"), ({"holds_for": {"dtype": "float32"}}, "holds_for"),
        ({"more": 1}, "no setting 'more'"),
    ):  # fmt: skip
        path.write_text(yaml.safe_dump({**content, **change}))
        with pytest.raises(InputError, match=words):
            protect(pipe, path)
    path.write_text("- nothing")
    with pytest.raises(InputError, match="no file of thresholds"):
        protect(pipe, path)


def test_the_command_writes_what_protect_reads(tmp_path, capsys, pipe):
    from conftest import GOLDEN

    lines = [f'{{"prompt": "{prompt}", "label": {i % 2}}}' for i, prompt in enumerate(ORDINARY * 2)]
    (tmp_path / "list.jsonl").write_text("\n".join(lines))
    calibrate_command([
        "--model", str(GOLDEN / "tiny-eps"), "--prompts", str(tmp_path / "list.jsonl"), "--fpr", "0.1", "--steps", "3",
        "--guidance-scale", "3", "--scheduler", "EulerDiscreteScheduler", "--out", str(tmp_path / "t.yaml"),
        "--dtype", "float32",
    ])  # fmt: skip
    assert "of 21 ordinary prompts reach it" in capsys.readouterr().out
    assert read_thresholds(tmp_path / "t.yaml").conditions.scheduler.startswith("EulerDiscreteScheduler ")
    with pytest.raises(InputError, match="is not one of"):
        calibrate_command(["--model", str(GOLDEN / "tiny-eps"), "--prompts", str(tmp_path / "list.jsonl"),
                           "--scheduler", "None"])  # fmt: skip
