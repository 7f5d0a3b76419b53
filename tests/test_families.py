"""Models of every family, on tiny pipelines of random weights: conversions, replayed calls, detectors, mitigations."""

import copy
import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import family_table
import pandas as pd
import pytest
import tiny_families
import torch
from conftest import GOLDEN, load_tiny
from diffusers import EDMEulerScheduler

import memorization as mem
from local_sd_pipeline import NoisePrediction, Scale
from memorization.cli.calibrate import main as calibrate_command
from memorization.cli.detect import main as detect_command
from memorization.detectors.anisotropy import Anisotropy
from memorization.detectors.base import DETECTORS, make_detectors
from memorization.detectors.noise_norm import NoiseNorm
from memorization.errors import InputError
from memorization.mitigations.base import MITIGATIONS
from memorization.mitigations.case import Remedy
from memorization.models.base import check_able, split_able, unit_of
from memorization.models.decoding import decode_pixels, encode_pixels
from memorization.models.families.guessed import Guessed
from memorization.models.families.sdxl import StableDiffusionXL
from memorization.models.generation import generate
from memorization.models.loading import load_model, revision_of
from memorization.models.pipelines import replayed
from memorization.models.replay import _divisor, check_step, first_call
from memorization.models.spec import find_model
from memorization.runs.cases import Cases
from memorization.runs.outcome import Outcome
from memorization.runs.sampling import sample
from memorization.runs.scorer import Scorer

FAMILIES = ("sdxl", "sd3", "pixart", "flux")
PROMPTS = ["a red kite", "", "two boats at dusk over a quiet harbour"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The tiny pipelines as folders, made when they are asked for."""
    return tiny_families.saved_in(tmp_path_factory.mktemp("families"))


@pytest.fixture(scope="module", params=FAMILIES)
def model(request):
    return replayed(getattr(tiny_families, request.param)(), request.param)


# ---------------------------------------------------------------- conversions
SCALES = [("epsilon", 0.6, 0.8), ("v_prediction", 0.6, 0.8), ("sample", 0.6, 0.8), ("flow", 0.3, 0.7)]


@pytest.mark.parametrize(("kind", "alpha", "sigma"), SCALES)
def test_an_output_is_read_as_every_other_kind(kind, alpha, sigma):
    x0, eps = torch.randn(2, 3, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    x = alpha * x0 + sigma * eps
    outputs = {"epsilon": eps, "v_prediction": alpha * eps - sigma * x0, "sample": x0, "flow": eps - x0}
    scale = Scale(kind, alpha, sigma)
    read = (scale.eps, scale.v, scale.x0, scale.velocity)
    if kind != "flow":  # v takes alpha^2 + sigma^2 = 1
        assert torch.allclose(scale.v(outputs[kind], x), outputs["v_prediction"], atol=1e-5)
    for convert, meant in zip(read, outputs.values(), strict=True):
        if convert != scale.v:
            assert torch.allclose(convert(outputs[kind], x), meant, atol=1e-5)


def test_a_prediction_of_a_flow_knows_them_all():
    x0, eps, other = torch.randn(3, 1, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    x = 0.25 * x0 + 0.75 * eps
    point = NoisePrediction(750, x, eps - x0, (eps - x0 + other)[None], 0.25, 0.75, "flow")
    assert torch.allclose(point.x0[0], x0, atol=1e-5) and torch.allclose(point.eps[0], eps, atol=1e-5)
    assert torch.allclose(point.x0[1][0], x0 - 0.75 * other, atol=1e-5)
    assert torch.allclose(point.norm, 0.75 * other.flatten(1).norm(dim=1) / 4, atol=1e-5)
    assert torch.allclose(point.v[0], 0.25 * eps - 0.75 * x0, atol=1e-5)
    assert torch.equal(point.velocity[0], point.uncond)


def test_the_norm_of_a_flow_is_not_zero_where_differences_of_eps_are():
    model = replayed(tiny_families.sd3(), "sd3")
    t = model.detection_timesteps(5)[0]
    with torch.no_grad():
        point = model.trace(model.embed(PROMPTS[:1]), model.pure_noise(2, 0), [t])[t]
    assert (point.alpha, point.sigma) == (0, 1)
    uncond, cond = point.eps
    assert torch.equal(uncond.expand_as(cond), cond)  # whatever the model says
    expected = (point.x0[1] - point.x0[0]).flatten(2).norm(dim=2) / point.latents[0].numel() ** 0.5
    assert (expected > 0.1).all()
    for found in (
        NoiseNorm()([point])["noise_norm"],
        Anisotropy()([point, point])["norm"],
        point.norm,
    ):
        assert torch.allclose(found, expected, rtol=1e-5)


# ---------------------------------------------------------------- calls that are made again
def test_it_answers_the_contract(model):
    embeds, noise = model.embed(PROMPTS), model.pure_noise(3, 7)
    assert len(embeds) == 3 and noise.shape[0] == 3
    assert torch.equal(model.pure_noise(2, 7), noise[:2])
    assert torch.equal(embeds[1:2], model.embed(["  "]))
    masks = [part[0] for part in model.parts(embeds).values() if not part.is_floating_point()]
    assert len(masks) == (model.family.name == "pixart") and model.free(embeds).shape == embeds[:1].shape
    assert model.free(embeds).sum() == embeds[0].numel() - sum(mask.numel() for mask in masks)
    grid = model.detection_timesteps(5)
    assert len(grid) == 5 and grid == sorted(grid, reverse=True)
    alpha, sigma = model.noise_scales(grid[1])
    flow = model.prediction_type == "flow"
    assert (alpha + sigma if flow else alpha**2 + sigma**2) == pytest.approx(1, abs=1e-6)


def test_scores_do_not_depend_on_the_batch_size(model):
    embeds, noise = model.embed(PROMPTS), model.pure_noise(2, 7)
    t = model.detection_timesteps(5)[1]
    with torch.no_grad():
        large, small = (model.trace(embeds, noise, [t], batch_size=size)[t] for size in (6, 1))
        alone = model.trace(model.embed(PROMPTS[2:]), noise[:1], [t])[t]
        again = model.trace(embeds, noise, [t], batch_size=6)[t]
    assert torch.equal(large.cond, again.cond)
    assert torch.allclose(large.norm, small.norm, rtol=1e-5, atol=1e-5)
    assert torch.allclose(alone.norm[0, 0], large.norm[2, 0], rtol=1e-5, atol=1e-5)
    assert (large.norm[1] == 0).all() and (large.norm[[0, 2]] > 0).all()


def first_step(model, prompt, scale):
    """Latents after the first step of the pipeline's own call on known noise, in our units."""
    seen = {}

    def callback(pipe, step, timestep, kwargs):
        seen.setdefault("after", kwargs["latents"])
        return kwargs

    noise, pipe, options = model.pure_noise(1, 3), model.pipe, {}
    options["latents"] = model.family.pack(noise)
    if "guidance" in model.can:
        options |= {"true_cfg_scale": scale, "negative_prompt": ""}
    else:
        options["guidance_scale"] = scale
    common = {"num_inference_steps": 5, "output_type": "latent"}
    if model.family.name == "pixart":  # has no such callback, but an old one
        made = []
        pipe(prompt, callback=lambda i, t, latents: made.append(latents.clone()), clean_caption=False,
             use_resolution_binning=False, **options, **common)  # fmt: skip
        return made[0]
    pipe(prompt, callback_on_step_end=callback, **options, **common)
    return model.family.unpack(pipe, seen["after"], model._call)


def test_a_step_is_that_of_the_pipelines_own_sampler(model):
    if model.family.name == "pixart":  # its sampler is of another kind; the first step of DDIM's is compared
        from diffusers import DDIMScheduler

        pipe = tiny_families.pixart()
        config = {**pipe.scheduler.config, "clip_sample": False}
        pipe.scheduler = DDIMScheduler.from_config(config, timestep_spacing="leading", steps_offset=1)
        model = replayed(pipe, "pixart")
    expected = first_step(model, PROMPTS[0], 3.0)
    with torch.no_grad():
        steps = generate(model, model.embed(PROMPTS[:1]), model.embed([""]), model.pure_noise(1, 3), steps=5,
                         guidance_scale=3.0)  # fmt: skip
        found = next(steps).after
    if hasattr(model.scheduler, "sigmas") and model.prediction_type != "flow":  # its latents are x / alpha
        found = found / model.noise_scales(model.detection_timesteps(5)[1])[0]
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


def test_bfloat16_says_nearly_the_same(model):
    t = model.detection_timesteps(5)[0]
    with torch.no_grad():
        full = model.trace(model.embed(PROMPTS), model.pure_noise(2, 7), [t])[t].norm
        half = replayed(getattr(tiny_families, model.family.name)().to(torch.bfloat16), "half")
        point = half.trace(half.embed(PROMPTS), half.pure_noise(2, 7), [t])[t]
    assert point.cond.dtype == torch.float32
    assert torch.allclose(point.norm[[0, 2]], full[[0, 2]], rtol=0.2)


def test_packed_latents_are_those_of_diffusers():
    model = replayed(tiny_families.flux(), "flux")
    x = model.pure_noise(2, 0)
    packed = model.family.pack(x)
    assert torch.equal(packed, model.pipe._pack_latents(x, 2, 4, 16, 16))
    assert torch.equal(model.family.unpack(model.pipe, packed, model._call), x)


def test_thresholds_of_the_guard_are_made_of_any_family_that_it_watches(folders, tmp_path, capsys):
    things = ("kite", "boat", "clock", "tree", "house")
    prompts = [f"{color} {thing}" for color in ("red", "blue", "green", "old") for thing in things]
    (tmp_path / "ordinary.txt").write_text("\n".join(prompts))
    common = ["--prompts", str(tmp_path / "ordinary.txt"), "--steps", "3", "--fpr", "0.2", "--dtype", "float32"]
    calibrate_command([*common, "--model", str(folders("sd3")), "--out", str(tmp_path / "t.yaml")])
    assert "threshold " in capsys.readouterr().out and (tmp_path / "t.yaml").is_file()
    with pytest.raises(InputError, match="cannot watch the family flux"):
        calibrate_command([*common, "--model", str(folders("flux")), "--out", str(tmp_path / "f.yaml")])


def test_zeros_stand_for_no_prompt_where_the_pipeline_says_so():
    model = replayed(tiny_families.sdxl(), "sdxl")
    assert (model.embed([""]) == 0).all() and model.contrast == "zeros"
    model.pipe.register_to_config(force_zeros_for_empty_prompt=False)
    other = replayed(model.pipe, "sdxl")
    assert (other.embed([""]) != 0).any() and other.contrast == "the empty prompt"


def test_what_stands_for_no_prompt_is_part_of_the_revision(folders, tmp_path):
    shutil.copytree(folders("sdxl"), tmp_path / "other")
    index = json.loads((tmp_path / "other" / "model_index.json").read_text())

    def revision(**change):
        (tmp_path / "other" / "model_index.json").write_text(json.dumps({**index, **change}))
        pipe = load_model(str(tmp_path / "other"), device="cpu", dtype="float32", any_family=True).pipe
        return revision_of(pipe, pictures=True)

    same, other = revision(_diffusers_version="0.1"), revision(force_zeros_for_empty_prompt=False)
    assert {key for key in same | other if same.get(key) != other.get(key)} == {"settings"}
    assert revision() == same


def test_an_autoencoder_that_float16_breaks_works_in_float32():
    vae = tiny_families.autoencoder(force_upcast=True)
    with torch.no_grad():
        vae.decoder.conv_in.weight *= 2e5  # float16 ends at 65504
        vae.decoder.conv_in.bias *= 2e5
        vae.encoder.conv_in.weight *= 2e5
    half, latents = copy.deepcopy(vae).half(), torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    vae.load_state_dict({key: one.half().float() for key, one in vae.state_dict().items()})
    pictures = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
    with torch.no_grad():
        decoded, expected = (decode_pixels(SimpleNamespace(vae=one), latents) for one in (half, vae))
        encoded = [encode_pixels(one, pictures) for one in (half, vae)]
    assert decoded.isfinite().all() and torch.equal(decoded, expected) and torch.equal(*encoded)
    assert half.dtype == torch.float16


def test_masks_are_no_numbers_that_may_be_changed():
    model = replayed(tiny_families.pixart(), "pixart")
    embeds = model.embed(PROMPTS)
    parts = model.parts(embeds)
    assert list(parts) == ["prompt_embeds", "prompt_attention_mask"]
    mask = parts["prompt_attention_mask"]
    assert not mask.is_floating_point() and mask.sum(1).tolist() == [10 + 1, 0 + 1, len(PROMPTS[2]) + 1]
    assert model.free(embeds).sum() == parts["prompt_embeds"][0].numel()


@pytest.mark.parametrize("name", FAMILIES)
def test_the_check_of_a_step_holds_for_every_family(name):
    check_step(replayed(getattr(tiny_families, name)(), name))


# ---------------------------------------------------------------- pipelines that have no file
def test_a_pipeline_without_a_file_is_read_from_its_calls():
    model = replayed(tiny_families.chroma(), "chroma")
    assert model.family.name == "guessed" and model.prediction_type == "flow" and model._divisor == 1000
    embeds, noise = model.embed(PROMPTS), model.pure_noise(2, 7)
    t = model.detection_timesteps(5)[0]
    with torch.no_grad():
        point = model.trace(embeds, noise, [t])[t]
        steps = generate(model, embeds[:1], model.embed([""]), model.pure_noise(1, 3), steps=5, guidance_scale=3.0)
        found = next(steps).after
    assert (point.norm[1] == 0).all() and (point.norm[[0, 2]] > 1e-4).all()
    expected = first_step(model, PROMPTS[0], 3.0)
    assert torch.allclose(found, expected, atol=1e-4)


def test_a_pipeline_whose_sampler_goes_another_way_is_refused():
    pipe = tiny_families.chroma()
    step = pipe.scheduler.step
    pipe.scheduler.step = lambda output, *args, **kwargs: step(-output, *args, **kwargs)
    with pytest.raises(InputError, match="ChromaPipeline: its sampler makes another step"):
        replayed(pipe, "chroma")


def test_what_cannot_be_read_is_said_in_one_line():
    pipe = tiny_families.chroma()
    family = Guessed(pipe)
    call = first_call(pipe, family, ["a", "a kite"])
    for changed, scheduler, said in (
        ({}, EDMEulerScheduler(), "says not how much noise there is"),
        ({"timestep": 1.0}, pipe.scheduler, "no timestep"),
        ({"hidden_states": [call["hidden_states"]]}, pipe.scheduler, "no latents of two or three axes"),
        ({"encoder_hidden_states": None, "attention_mask": None}, pipe.scheduler, "nothing that tells prompts apart"),
    ):
        with pytest.raises(InputError, match=said):
            family.read(SimpleNamespace(scheduler=scheduler), {**call, **changed})
    pipe.transformer = None
    with pytest.raises(InputError, match="has no transformer and no unet"):
        replayed(pipe, "chroma")


@pytest.mark.parametrize(("given", "divisor"), [
    (torch.tensor([999.0], dtype=torch.bfloat16), 1), (torch.tensor([0.999], dtype=torch.bfloat16), 1000),
    (torch.tensor(999), 1), (torch.tensor([0.0999]), 10000),
])  # fmt: skip
def test_the_unit_of_time_is_read_though_it_was_rounded(given, divisor):
    scheduler = SimpleNamespace(timesteps=torch.tensor([999.0]), config=SimpleNamespace(num_train_timesteps=1000))
    assert _divisor(SimpleNamespace(scheduler=scheduler), given) == pytest.approx(divisor, rel=1e-6)


@pytest.mark.parametrize("first", [0.0, float("nan"), -1.0])
def test_time_that_runs_the_other_way_is_one_line(first):
    pipe = tiny_families.chroma()
    forward = pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: (args, {**kwargs, "timestep": torch.full_like(kwargs["timestep"], first)}),
        with_kwargs=True,
    )
    with pytest.raises(InputError, match=r"ChromaPipeline: gives its denoiser .* no share of it, as 1 - s"):
        replayed(pipe, "chroma")
    forward.remove()


# ---------------------------------------------------------------- what it cannot do
def test_what_a_family_cannot_do_is_said_in_one_line():
    model = replayed(tiny_families.sd3(), "sd3")
    able, lines = split_able(model, make_detectors(["all"]))
    names = [detector.name for detector in able]
    assert "noise_norm" in names and "bright_ending" not in names and "two_guidances" not in names
    assert lines == [
        "bright_ending, attention_entropy: needs a UNet's cross-attention on the tokens, which this model has not",
        "two_guidances: needs a guidance scale that its denoiser is given, which this model has not",
    ]
    with pytest.raises(InputError, match="bright_ending: needs a UNet"):
        Scorer(model, make_detectors(["bright_ending"]), noises=1, seed=0, steps=5, batch_size=2)
    for name in ("nemo", "attention_rescale", "padding_mask", "rewrite", "amg"):
        with pytest.raises(InputError, match=f"{name}: needs"):
            check_able(model, [SimpleNamespace(name=name, asks=MITIGATIONS[name].asks)])


def test_two_guidances_is_the_difference_of_clean_latents():
    model = replayed(tiny_families.flux(), "flux")
    (found,) = Scorer(
        model, make_detectors(["two_guidances"], {"two_guidances": {"low": 2, "high": 4}}), noises=1, seed=3, steps=5,
        batch_size=4,
    )(PROMPTS[:1])  # fmt: skip
    t, embeds, x = model.detection_timesteps(5)[0], model.embed(PROMPTS[:1]), model.pure_noise(1, 3)
    with torch.no_grad():
        low, high = (x - model.predict_noise(x, t, embeds, guidance=g) for g in (2.0, 4.0))
    expected = (high - low).norm() / 2 / x.numel() ** 0.5
    assert expected > 0 and found["two_guidances"][0] == pytest.approx(expected.item(), rel=1e-4)


# ---------------------------------------------------------------- the whole way
def test_what_is_saved_of_a_remedy_is_what_the_pipeline_takes(model):
    case = case_of(model)
    embeds = case.embeds * (1 + 0.5 * model.free(case.embeds))
    remedy = Remedy.unchanged(case, embeds=embeds, latents=case.noise[None] * 0.5)
    found = Outcome(remedy, None, None, 0.0).changed(case, 0)
    assert set(found) == {*model.family.embeddings, "latents"}
    seen = []

    def stop(module, args, kwargs):
        seen.append(model.family.named(args, kwargs))
        raise StopIteration

    hook = model.denoiser.register_forward_pre_hook(stop, with_kwargs=True)
    with pytest.raises(StopIteration):
        model.pipe(**found, **model.family.unguided, num_inference_steps=2, output_type="latent")
    hook.remove()
    latents = model.family.unpack(model.pipe, seen[0][model.family.latents], seen[0])
    assert torch.allclose(latents, remedy.latents[0], atol=1e-5)
    assert torch.allclose(model._row_of(model.family.condition(seen[0])), embeds, atol=1e-5)


def test_of_a_pipeline_without_a_file_nothing_is_saved():
    model = replayed(tiny_families.chroma(), "chroma")
    embeds, noise = model.embed(PROMPTS[:1]), model.pure_noise(1, 0)
    assert model.given(embeds, noise) == {} and list(load_tiny("tiny-eps").given(None, noise)) == ["latents"]


def test_every_detector_that_is_able_gives_finite_values(model):
    made = make_detectors(["all"], {"p_laplace": {"points": 2}, "flipd": {"probes": 1}})
    detectors, _ = split_able(model, made)
    (row,) = Scorer(model, detectors, noises=1, seed=1, steps=11, batch_size=8)(PROMPTS[:1])
    terms = {name for detector in detectors for name in detector.terms}
    assert terms <= set(row) and terms >= {"anisotropy", "noise_norm", "one_step", "p_laplace", "sharpness"}


def case_of(model):
    detectors = {d.name: d for d in make_detectors(["anisotropy", "noise_norm", "second_look"])}
    cases = Cases(model, model.pure_noise(1, 1), 4, 3.0, 51, 8, detectors)
    return cases(PROMPTS[:1])


@pytest.mark.parametrize("name", ["noise_norm", "anisotropy", "second_look", "sail", "reanchor"])
def test_descents_lower_their_score(model, name):
    case = case_of(model)
    mitigation = MITIGATIONS.make(name, {"target": -1e9, "iterations": 3, **({"alpha": 0} if name == "sail" else {})})
    before = case.score(mitigation.lowers, case.embeds).item()
    remedy = mitigation(case)
    if name == "sail":
        after = replace(case, noise=remedy.latents[0]).score("noise_norm", case.embeds).item()
        assert after < before
        return
    assert case.score(mitigation.lowers, remedy.embeds).item() < before
    fixed = model.free(case.embeds) == 0
    assert torch.equal(remedy.embeds[:, fixed[0]], case.embeds[:, fixed[0]])


def test_the_size_of_a_flows_start_weighs_as_elsewhere():
    """D of a flow is over sqrt(d): with the whole size beside it, the prompt's pull would hardly count."""
    case = case_of(replayed(tiny_families.sd3(), "sd3"))
    root = case.noise[0].numel() ** 0.5
    case = replace(case, noise=case.noise * (root + 1) / case.noise.norm())  # its size is 1 over the usual one
    pull = case.score("noise_norm", case.embeds).item()
    settings = {"target": 2 * pull, "alpha": 4 * pull, "iterations": 5}  # that 1, over sqrt(d), is well below the bound
    assert MITIGATIONS.make("sail", settings)(case).iterations == [0]
    falls = MITIGATIONS.make("sail", {"target": -1e9, "iterations": 8})(case)
    assert replace(case, noise=falls.latents[0]).score("noise_norm", case.embeds).item() < pull


@pytest.mark.parametrize(
    "name",
    ["static_transition", "dynamic_transition", "rna", "rt", "cwr", "gni", "attention_rescale", "padding_mask", "amg"],
)
def test_other_mitigations_give_pictures(model, name, pictures_index):
    case, settings = case_of(model), {"index": pictures_index} if name == "amg" else {}
    if split_able(model, [MITIGATIONS[name]])[1]:
        pytest.skip("cannot")
    with torch.no_grad():
        remedy = MITIGATIONS.make(name, settings)(case)
        pictures = sample(case, remedy)
    assert pictures.shape[:2] == (1, 1) and pictures.dtype == "uint8"
    if name in ("rna", "rt", "cwr", "gni"):
        assert not torch.equal(remedy.embeds, case.embeds)


@pytest.mark.parametrize("name", ["sdxl", "sd3"])
def test_the_command_scores_a_folder(folders, name, tmp_path, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red kite\ntwo boats\n")
    common = ["--model", str(folders(name)), "--prompts", str(prompts), "--steps", "11", "--dtype", "float32"]
    detect_command([*common, "--detectors", "all", "--set", "p_laplace.points=2", "--out", str(tmp_path / "run")])
    assert "left out: " in capsys.readouterr().err
    rows = [json.loads(line) for line in (tmp_path / "run" / "scores.jsonl").read_text().splitlines()]
    assert len(rows) == 2 and all(row["noise_norm"][0] > 0 for row in rows)
    settings = json.loads((tmp_path / "run" / "run.json").read_text())["settings"]
    network = "unet" if name == "sdxl" else "transformer"
    assert {network, "text_encoder", "text_encoder_2", "tokenizer_2", "scheduler"} <= set(settings["revision"])
    assert settings["contrast"] == ("zeros" if name == "sdxl" else "the empty prompt")
    with pytest.raises(InputError, match="two_guidances: needs a guidance scale"):
        detect_command([*common, "--detectors", "two_guidances", "--out", str(tmp_path / "other")])


@pytest.mark.parametrize(("flags", "said"), [
    (["--explain"], "tokens cannot be explained: needs one text encoder"),
    (["--localise", "bright_ending"], "bright_ending: needs a UNet's cross-attention"),
])  # fmt: skip
def test_what_would_fail_after_the_list_fails_before_it(folders, tmp_path, flags, said):
    (tmp_path / "p.txt").write_text("a red kite\n")
    with pytest.raises(InputError, match=said):
        detect_command(["--model", str(folders("sd3")), "--prompts", str(tmp_path / "p.txt"), "--dtype", "float32",
                        "--detectors", "noise_norm", *flags, "--out", str(tmp_path / "run")])  # fmt: skip
    assert not (tmp_path / "run").exists()


def test_a_hub_id_is_scored_without_its_autoencoder(folders, tmp_path, monkeypatch):
    """Which is not downloaded then."""
    asked = {}

    def download(identifier, **options):
        asked.update({identifier: options})
        unused = [part for part, one in options.items() if one is None]
        return shutil.copytree(folders("sd3"), tmp_path / "hub", ignore=shutil.ignore_patterns(*unused))

    monkeypatch.setattr("memorization.models.loading.DiffusionPipeline.download", download)
    (tmp_path / "p.txt").write_text("a red kite\n")
    for model, out in (("org/sd3", "hub-run"), (str(folders("sd3")), "folder-run")):
        detect_command(["--model", model, "--prompts", str(tmp_path / "p.txt"), "--detectors", "noise_norm",
                        "--dtype", "float32", "--out", str(tmp_path / out)])  # fmt: skip
    assert asked["org/sd3"]["vae"] is None and not (tmp_path / "hub" / "vae").exists()
    runs = [(tmp_path / out / "scores.jsonl").read_text() for out in ("hub-run", "folder-run")]
    assert runs[0] == runs[1]


def test_the_size_of_pictures_is_the_same_without_an_autoencoder(folders):
    """It is part of SDXL's condition."""
    options = {"device": "cpu", "dtype": "float32", "any_family": True}
    bare, whole = (load_model(str(folders("sdxl")), pictures=pictures, **options).pipe for pictures in (False, True))
    assert bare.vae is None and whole.vae is not None
    times = [model._call["added_cond_kwargs"]["time_ids"] for model in (bare, whole)]
    assert torch.equal(*times)


def test_python_takes_a_folder(folders):
    model = mem.load(folders("sdxl"), device="cpu", dtype="float32")
    frame = mem.score(model, PROMPTS, detectors=["noise_norm"], steps=5)
    assert model.spec.guidance_scale == 5.0  # the pipeline's own
    assert frame["noise_norm"][1] == [0.0] and frame["noise_norm"][0][0] > 0


def test_a_model_is_guided_as_its_pipeline_guides_it():
    scales = {name: replayed(getattr(tiny_families, name)(), name).guidance_scale for name in (*FAMILIES, "chroma")}
    assert scales == {"sdxl": 5.0, "sd3": 7.0, "pixart": 4.5, "flux": 1.0, "chroma": 5.0}
    schnell = replayed(tiny_families.flux(guided=False), "schnell")
    assert "guidance" not in schnell.can and schnell.guidance_scale == 1.0
    for default in (None, 4):

        def call(self, prompt=None, guidance_scale=default):
            raise NotImplementedError

        pipe = type("Own", (), {"__call__": call})()
        assert StableDiffusionXL().guidance_scale(pipe) == float(default or 1)
    assert StableDiffusionXL().guidance_scale(type("Own", (), {"__call__": lambda self: None})()) == 1


def test_a_yaml_that_names_no_scale_leaves_it_to_the_pipeline(folders, tmp_path):
    found = {}
    for text in ("", "guidance_scale: 2.5\n"):
        (tmp_path / "mine.yaml").write_text(f"ids: [{folders('sd3')}]\n{text}")
        found[text] = mem.load(tmp_path / "mine.yaml", device="cpu", dtype="float32").spec.scale
    assert list(found.values()) == [7.0, 2.5]
    assert mem.load(GOLDEN / "tiny-eps", device="cpu", dtype="float32").spec.scale == find_model("sd14").scale == 7.5


def test_a_scale_that_goes_in_with_the_time_is_refused():
    with pytest.raises(InputError, match=r"StableDiffusionXLPipeline: its unet is given .*time_cond_proj_dim"):
        replayed(tiny_families.sdxl(time_cond_proj_dim=8), "lcm")


def test_what_is_for_stable_diffusion_alone_says_so(folders):
    with pytest.raises(InputError, match="a StableDiffusion3Pipeline; this command is for Stable Diffusion 1 and 2"):
        load_model(str(folders("sd3")), device="cpu", dtype="float32")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"transformer": ["my_package", "Evil"]}, "transformer = .* is no part of diffusers or transformers"),
        ({"transformer": ["diffusers", "DiffusionPipeline"]}, "is no part of"),
        ({"text_encoder_2": ["transformers", "AutoModel"]}, "is no part of"),
        ({"transformer": [None, None]}, "sd3-damaged"),
    ],
)
def test_an_index_names_only_parts_that_are_loaded(folders, change, said, tmp_path):
    damaged = tmp_path / "sd3-damaged"
    damaged.mkdir()
    for part in folders("sd3").iterdir():
        if part.is_dir():
            (damaged / part.name).symlink_to(part)
    index = json.loads((folders("sd3") / "model_index.json").read_text())
    (damaged / "model_index.json").write_text(json.dumps({**index, **change}))
    with pytest.raises(InputError, match=said):
        mem.load(damaged, device="cpu", dtype="float32")


def test_units_are_those_of_the_family(model):
    kind = "flow" if model.prediction_type == "flow" else "epsilon"
    assert unit_of(model, model.detection_timesteps(5)[1]).kind == kind
    assert unit_of(load_tiny("tiny-v"), 41).kind == "epsilon"


def test_the_table_of_the_documents_is_what_methods_ask_and_models_can():
    assert family_table.table().equals(pd.read_csv(family_table.TABLE, dtype=str).fillna("")), "family_table.py"


def test_every_built_in_detector_says_what_it_asks():
    assert {name for name in DETECTORS if DETECTORS[name].asks} == {
        "bright_ending", "attention_entropy", "two_guidances"
    }  # fmt: skip
