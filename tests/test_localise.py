"""Maps on densities whose curvature is known, their agreement with masks, and the command and study around them."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import GOLDEN, load_tiny

import detect_mem
from local_sd_pipeline import NoisePrediction
from memorization.errors import InputError
from memorization.evaluation.regions import agreement, iou, otsu
from memorization.io.figures import overlay
from memorization.io.pictures import read_picture, save_picture
from memorization.localisation.base import MAPS, make_maps
from memorization.localisation.bright_ending import BrightEnding
from memorization.localisation.curvature import Curvature
from memorization.localisation.score_difference import ScoreDifference
from memorization.models.attention import Attention
from memorization.models.generation import Step
from memorization.runs.localise import Located, Locator
from memorization.studies import localise

SHAPE = (2, 3, 4)


class Gaussians:
    """With prompt k, N(alpha m_k, diag(v_k)) at t; without, N(0, I) with a coupling between neighbours in its eps."""

    alpha, sigma = 0.8, 0.6

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        self.mean = torch.randn(2, *SHAPE, generator=generator)
        self.variance = torch.rand(2, *SHAPE, generator=generator) + 0.1
        self.coupling = torch.randn(24, 24, generator=generator) / 50

    def noise_scales(self, timestep):
        assert timestep == 10
        return self.alpha, self.sigma

    def __call__(self, latents, timestep, cond=True):
        if cond:
            return self.sigma * (latents - self.alpha * self.mean[:, None]) / self.variance[:, None]
        return self.sigma * (latents + (latents.flatten(2) @ self.coupling.T).view_as(latents))


def last_step(z, attention=None):
    zero = torch.zeros_like(z)
    return Step(49, NoisePrediction(1, zero, zero, zero, 0.99, 0.1, "epsilon"), zero, z, attention)


def test_curvature_of_gaussians():
    """diag(-H) is 1 / v with the prompt, 1 plus the coupling's diagonal without."""
    model, z = Gaussians(), torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(1))
    found = Curvature(probes=2000)(last_step(z), model)
    expected = (1 / model.variance - 1 - model.coupling.diagonal().view(SHAPE)).sum(1)
    assert found.shape == (2, 3, 4) and torch.allclose(found, expected, atol=0.02)


def test_score_difference_of_gaussians():
    model, z = Gaussians(), torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(1))
    x = (model.alpha * z).double()
    found = ScoreDifference()(last_step(z), model)
    score_c = -(x - model.alpha * model.mean.double()) / model.variance.double()
    score_u = -x - (x.flatten(1) @ model.coupling.double().T).view_as(x)
    assert torch.allclose(found.double(), (score_c - score_u).square().sum(1), rtol=1e-4)


def test_bright_ending_is_the_end_of_texts_attention():
    end = torch.rand(2, 3, 4)
    assert torch.equal(BrightEnding()(last_step(torch.zeros(2, *SHAPE), Attention(None, end, None)), None), end)


def test_maps_of_a_prompt_whatever_the_batch_size():
    pipe = load_tiny("tiny-v", pictures=True)

    def located(batch_size):
        locate = Locator(pipe, make_maps(["all"]), noises=3, seed=5, steps=6, guidance_scale=3.0, batch_size=batch_size)
        return locate("red kite")

    large, small = located(8), located(2)
    assert list(large.maps) == list(MAPS) and large.pictures.shape[0] == 3
    for name, values in large.maps.items():
        assert values.shape == (3, 16, 16) and values.dtype == np.float32
        assert np.allclose(values, small.maps[name], rtol=0.02, atol=0.02 * np.abs(values).max())
    assert (large.maps["bright_ending"] > 0).all() and large.maps["bright_ending"].max() < 1


def test_curvature_refuses_half_precision():
    pipe = load_tiny("tiny-eps", "bfloat16")
    with pytest.raises(InputError, match="curvature: small differences drown"):
        Locator(pipe, make_maps(["all"]), noises=1, seed=0, steps=5, guidance_scale=3.0, batch_size=2)


def test_agreement_with_a_mask_by_hand():
    mask = np.zeros((4, 4), bool)
    mask[:2, :2] = True
    values = np.zeros((4, 4))
    values[:2, :2] = [[9, 8], [9, 1]]  # finds three of four
    values[3, 3] = 7  # and one too many
    found = agreement(values, mask)
    assert found["iou"] == pytest.approx(3 / 5) and found["iou at its area"] == pytest.approx(3 / 5)
    assert found["auc"] == pytest.approx((3 * 12 + 11) / 48)
    assert agreement(-values, mask)["auc"] == pytest.approx(1 - (3 * 12 + 11) / 48)
    assert iou(mask, mask) == 1 and iou(mask, ~mask) == 0


def test_otsu_parts_two_heaps():
    rng = np.random.default_rng(0)
    values = np.concatenate([rng.normal(0, 1, 900), rng.normal(10, 1, 100)])
    assert 2.5 < otsu(values) < 7.5
    assert otsu(np.array([1.0, 1.0, 4.0, 4.0])) == 2.5 and not (np.full(3, 2.0) > otsu(np.full(3, 2.0))).any()


def test_overlay_is_brightest_where_the_map_is_highest():
    values = np.zeros((4, 4))
    values[0, 3] = 5
    found = overlay(np.zeros((16, 16, 3), np.uint8), values).astype(int).sum(2)
    assert found.shape == (16, 16) and np.unravel_index(found.argmax(), found.shape) in {(0, 15), (0, 14), (1, 15)}
    assert overlay(np.full((4, 4, 3), 100, np.uint8), np.ones((4, 4))).max() <= 42  # a flat map is dark, not NaN


def test_distances_are_taken_inside_and_outside_the_mask(tmp_path):
    training, mask = np.full((8, 8, 3), 100, np.uint8), np.zeros((8, 8), bool)
    mask[:4] = True
    picture = np.where(mask[..., None], 151, 202).astype(np.uint8)
    save_picture(training, tmp_path / "training.png")
    values = {"curvature": np.tile(np.linspace(1, 0, 8)[:, None], (1, 8))[None]}
    line = localise.line_of(Located(picture[None], values), mask, tmp_path / "training.png")
    assert line["inside"] == [0.4] and line["outside"] == [0.8] and line["area"] == 0.5
    assert line["curvature: auc"] == [1] and line["curvature: iou at its area"] == [1]
    values["curvature"][0, 1, ::4] = 0  # single pixels that are off
    rough, smooth = (localise.line_of(Located(picture[None], values), mask, None, blur) for blur in (0, 1))
    assert smooth["curvature: auc"][0] > rough["curvature: auc"][0] and "inside" not in smooth


def test_table_takes_copies_alone_where_asked():
    rows = [{"prompt": "a", "family": "f", "area": 0.2, "m: auc": [0.9, 0.5], "m: iou": [0.8, 0.1],
             "m: iou at its area": [0.8, 0.1], "inside": [0.1, 0.9]},
            {"prompt": "b", "family": "g", "area": 0.6, "m: auc": [0.6, 0.6], "m: iou": [0.2, 0.2],
             "m: iou at its area": [0.2, 0.2], "inside": [0.8, 0.8]}]  # fmt: skip
    every, copies = (localise.table_of(rows, ["m"], 100, limit) for limit in (None, 0.3))
    assert every.loc[0, "auc"] == pytest.approx(0.65) and every.loc[0, "pictures"] == 4
    assert copies.loc[0, "auc"] == 0.9 and copies.loc[0, "pictures"] == 1 and copies.loc[1, "iou"] == 0.2
    assert every.loc[1, "iou"] == pytest.approx(0.4) and localise.table_of(rows, ["m"], 100, 0.05).empty


@pytest.fixture
def masked_list(tmp_path):
    half = np.zeros((32, 32, 3), np.uint8)
    half[:, 16:] = 255
    save_picture(half, tmp_path / "half.png")
    save_picture(np.full((32, 32, 3), 90, np.uint8), tmp_path / "training.png")
    rows = [{"prompt": "red kite", "mask": "half.png", "image": "training.png"}, {"prompt": "no mask", "mask": ""},
            {"prompt": "two boats", "mask": "half.png", "image": "training.png"}]  # fmt: skip
    path = tmp_path / "list.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_study_goes_on_where_it_stopped(run_script, masked_list, tmp_path, capsys):
    common = ("--model", GOLDEN / "tiny-eps", "--prompts", masked_list, "--dtype", "float32", "--device", "cpu",
              "--noises", 2, "--steps", 5, "--set", "curvature.probes=2", "--resamples", 100, "--copied", 2,
              "--out", tmp_path / "out")  # fmt: skip
    run_script(localise, *common)
    lines = (tmp_path / "out" / "scores.jsonl").read_bytes()
    table = pd.read_csv(tmp_path / "out" / "table.csv").set_index("map")
    assert list(table.index) == [*MAPS, "the whole picture"] and table.loc["curvature", "pictures"] == 4
    assert table.loc["the whole picture", "iou"] == 0.5 and (tmp_path / "out" / "copied.csv").exists()
    (tmp_path / "out" / "scores.jsonl").write_bytes(lines[:-20])
    run_script(localise, *common)
    assert (tmp_path / "out" / "scores.jsonl").read_bytes() == lines and "copies alone" in capsys.readouterr().out
    assert (tmp_path / "out" / "sheet.png").stat().st_size > 1000
    with np.load(tmp_path / "out" / "maps" / "0001.npz") as kept:
        line = json.loads(lines.splitlines()[1])
        assert line["prompt"] == "two boats" and set(kept) == set(MAPS)


def test_a_mask_of_one_colour_is_refused(run_script, masked_list, tmp_path):
    save_picture(np.full((32, 32, 3), 255, np.uint8), tmp_path / "half.png")
    with pytest.raises(InputError, match=r"half\.png: is one colour all over"):
        run_script(localise, "--model", GOLDEN / "tiny-eps", "--prompts", masked_list, "--dtype", "float32",
                   "--maps", "score_difference", "--noises", 1, "--steps", 3, "--out", tmp_path / "out")  # fmt: skip


def test_detection_draws_maps_of_the_highest(run_script, prompt_file, tmp_path, capsys):
    run_script(detect_mem, "--model", GOLDEN / "tiny-eps", "--prompts", prompt_file, "--dtype", "float32", "--device",
               "cpu", "--detectors", "noise_norm", "--steps", 5, "--localise", "score_difference,bright_ending",
               "--set", "score_difference.timestep=41", "--out", tmp_path / "run")  # fmt: skip
    scores = [json.loads(line) for line in (tmp_path / "run" / "scores.jsonl").read_text().splitlines()]
    highest = {row["id"] for row in sorted(scores, key=lambda row: -row["noise_norm"][0])[:10]}
    folder = tmp_path / "run" / "maps"
    assert {int(path.stem) for path in folder.glob("*.npz")} == highest and len(highest) == 10
    name = f"{min(highest):04d}"
    plain, heat = (read_picture(folder / f"{name}-0{end}.png", None) for end in ("", "-score_difference"))
    with np.load(folder / f"{name}.npz") as kept:
        assert np.array_equal(heat, overlay(plain, kept["score_difference"][0]))
    assert "maps:   10 prompts" in capsys.readouterr().out
    for arguments, said in ((("--set", "curvature.probes=2"), "of a detector that --detectors names"),
                            (("--localise", "nonsense"), "unknown map nonsense")):  # fmt: skip
        with pytest.raises(InputError, match=said):
            run_script(detect_mem, "--model", GOLDEN / "tiny-eps", "--prompts", prompt_file, *arguments)
