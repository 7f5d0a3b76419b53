"""What holds on a CUDA card alone; skipped where there is none."""

import numpy as np
import pytest
import tiny_families
import torch
from conftest import GOLDEN, PROMPTS, load_tiny
from pandas import DataFrame

import memorization as mem
from benchmarks.denoisers import graphed, in_place, plain_call
from memorization.detectors.base import make_detectors
from memorization.runs.detect import run_detection
from memorization.runs.scorer import Scorer
from memorization.runs.store import MemoryStore

pytestmark = pytest.mark.cuda
DEVICE = "cuda"
MODELS = ("tiny-eps", "tiny-v")


def scored(pipe, detectors=("anisotropy", "one_step"), prompts=PROMPTS):
    """Score -> its values ``(prompts, noises, ...)``."""
    rows = Scorer(pipe, make_detectors(detectors), noises=2, seed=51, steps=12, batch_size=4)(prompts)
    return {name: np.array([row[name] for row in rows]) for name in rows[0]}


def assert_near(found, expected, tolerance):
    """Every value, relative to the largest of its name."""
    assert set(found) == set(expected)
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, rtol=0, atol=tolerance * np.abs(values).max(), err_msg=name)


@pytest.mark.parametrize("name", MODELS)
def test_every_score_is_that_of_the_cpu(name):
    prompts = [PROMPTS[0], PROMPTS[1]]  # of a blank one some scores are ratios of nothing
    expected = scored(load_tiny(name), ["all"], prompts)
    assert_near(scored(load_tiny(name, device=DEVICE), ["all"], prompts), expected, 1e-3)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 0.1), ("float16", 0.01)])
def test_half_precision_has_no_nan_and_is_near(name, dtype, tolerance):
    found = scored(load_tiny(name, dtype, DEVICE))  # the scorer itself refuses what is not finite
    assert_near(found, scored(load_tiny(name)), tolerance)


def test_blank_prompt_has_no_guidance_to_the_bit():
    pipe = load_tiny("tiny-eps", "bfloat16", DEVICE)
    values = scored(pipe, ["noise_norm"], ["a kite", "", " ", "a boat"])["noise_norm"]
    assert (values[1:3] == 0).all() and (values[[0, 3]] > 0).all()


def test_batch_is_halved_when_the_card_is_out_of_memory():
    pipe, sizes = load_tiny("tiny-eps", device=DEVICE), []

    def greedy(unet, given):
        sizes.append(len(given[0]))
        if len(given[0]) > 4:
            torch.empty(2**50, dtype=torch.uint8, device=DEVICE)  # more than any card has

    hook = pipe.unet.register_forward_pre_hook(greedy)
    with MemoryStore({}) as store:
        detectors = make_detectors(["noise_norm"])
        run_detection(
            lambda batch_size: Scorer(pipe, detectors, noises=1, seed=51, steps=12, batch_size=batch_size),
            DataFrame({"prompt": PROMPTS * 4}), store, batch_size=16,
        )  # fmt: skip
    hook.remove()
    assert store.record["batch_size_used"] == 4 and {16, 8, 4} <= set(sizes)
    expected = scored(load_tiny("tiny-eps"), ["noise_norm"])["noise_norm"][:, 0]
    np.testing.assert_allclose([row["noise_norm"][0] for row in store.rows], np.tile(expected, 4), rtol=1e-3)


def test_an_offloaded_model_has_the_same_scores():
    pipe = load_tiny("tiny-v", pictures=True)
    pipe.enable_model_cpu_offload(device=DEVICE)
    found = scored(pipe)
    assert pipe.text_encoder.device.type == "cpu" or pipe.unet.device.type == "cpu"  # never both on the card
    assert_near(found, scored(load_tiny("tiny-v")), 1e-3)


@pytest.mark.parametrize("how", ["model", "group"])
def test_what_a_command_offloads_has_the_same_scores(how, tmp_path):
    tiny_families.flux().save_pretrained(tmp_path / "flux")
    for folder in (GOLDEN / "tiny-v", tmp_path / "flux"):
        options = {"device": DEVICE, "dtype": "float32"}
        pipe = mem.load(folder, offload=how, **options).pipe
        assert_near(scored(pipe), scored(mem.load(folder, **options).pipe), 1e-3)
        assert pipe.device.type == pipe.vae.device.type == "cuda" and pipe.text_encoder.device.type == "cpu"
        assert pipe.denoiser.device.type == ("cuda" if how == "model" else "cpu")


@torch.no_grad()
def test_a_cuda_graph_takes_new_arguments():
    pipe = load_tiny("tiny-eps", device=DEVICE)
    call, embeds = plain_call(pipe.unet), pipe.embed(PROMPTS[:2])
    first, second = ({"sample": pipe.pure_noise(2, seed), "timestep": torch.tensor(t, device=DEVICE),
                      "encoder_hidden_states": embeds.roll(t, 0)} for seed, t in ((1, 981), (2, 40)))  # fmt: skip
    replay = graphed(call, first)
    made = replay(**second)
    torch.testing.assert_close(replay(**first), call(**first), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(made, call(**second), rtol=1e-4, atol=1e-4)  # nor does a later replay change it
    expected = pipe.predict_pairs(first["sample"], 981, embeds, 2)
    with in_place(pipe.unet, replay, 2):
        torch.testing.assert_close(pipe.predict_pairs(first["sample"], 981, embeds, 2), expected, rtol=1e-4, atol=1e-4)
