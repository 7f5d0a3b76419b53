"""Image detectors on known densities, features, and the studies' tables."""

import json
import math
import sys
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import GOLDEN, load_tiny

from local_sd_pipeline import NoisePrediction
from memorization.detectors.base import make_detectors
from memorization.detectors.features import FEATURES, features
from memorization.detectors.guidance_flux import GuidanceFlux
from memorization.detectors.p_laplace import PLaplace
from memorization.errors import InputError
from memorization.io.published import PUBLISHED
from memorization.models.base import split_able
from memorization.models.generation import Step
from memorization.runs.costs import counted_rows
from memorization.runs.pictures import PictureScorer
from memorization.runs.scorer import Scorer
from memorization.studies import benchmark_audit, fusion, p_laplace_sweep, sequential, timestep_sweep

SHAPE = (4, 3, 3)


class Gaussians:
    """A predictor whose noised density is N(alpha z, v I) round each row's own z with the prompt, N(0, I) without."""

    def __init__(self, z, v, timestep=10):
        self.z, self.v, self.timestep = z, v, timestep

    def noise_scales(self, timestep):
        assert timestep == self.timestep
        return 0.9, math.sqrt(1 - 0.81)

    def __call__(self, latents, timestep, cond=True):
        alpha, sigma = self.noise_scales(timestep)
        return sigma * ((latents - alpha * self.z[:, None]) / self.v if cond else latents)


def test_p_laplace_of_a_peak():
    """On the peak of N(m, v I) minus the mean of Delta_1 log p over the ball is d / R; of Delta_2, d / v."""
    z = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0))
    predict = Gaussians(z, 0.05)
    d, sigma = z[0].numel(), predict.noise_scales(10)[1]
    values = PLaplace(power=1.0)(z, predict)
    assert torch.allclose(values["p_laplace_prompt"], torch.full((2,), d / (sigma * d**0.5)), rtol=1e-4)
    assert (values["p_laplace"] < values["p_laplace_prompt"]).all()
    predict.timestep = 70
    values = PLaplace(power=2.0, timestep=70)(z, predict)
    assert torch.allclose(values["p_laplace_prompt"], torch.full((2,), d / 0.05), rtol=1e-4)
    assert torch.allclose(values["p_laplace"], torch.full((2,), float(d)), rtol=0.5)


def test_guidance_that_pulls_to_the_guess_has_flux_one():
    """eps_c - eps_u = k (x - alpha x0): the prompt pulls back from every side."""
    z = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0))
    detector = GuidanceFlux(every=2)

    def kept(sign):
        def predict(latents, timestep, cond=True):
            return sign * (latents - 0.9 * z[:, None]) if cond else torch.zeros_like(latents)

        point, model = NoisePrediction(500, z, z, z, 0.9, 0.4, "epsilon"), SimpleNamespace(raw=predict)
        return torch.stack([detector.reduce(Step(i, point, z, z, None), model) for i in range(4)])

    def measured(x, t, cond=True):
        distance = (x - 0.9 * z[:, None]).flatten(2).norm(dim=2)
        assert t == 500 and torch.allclose(distance, torch.full_like(distance, 0.4 * 36**0.5))
        return x

    point = NoisePrediction(500, z, z, z, 0.9, 0.4, "epsilon")
    detector.reduce(Step(0, point, z, z, None), SimpleNamespace(raw=measured))
    assert detector(torch.tensor([[1.0], [math.nan], [4.0]]))["guidance_flux"].item() == 2.5  # mean of what was read
    assert torch.allclose(detector(kept(1))["guidance_flux"], torch.ones(2), atol=1e-4)
    assert torch.allclose(detector(kept(-1))["guidance_flux"], -torch.ones(2), atol=1e-4)


def test_features_have_the_axes_of_the_trace_and_of_a_generation():
    generator = torch.Generator().manual_seed(0)
    cond, uncond, x = (torch.randn(*axes, *SHAPE, generator=generator) for axes in ((3, 2), (2,), (2,)))
    found = features(NoisePrediction(1, x, uncond, cond, 0.9, 0.4, "epsilon"))
    assert tuple(found) == FEATURES and {value.shape for value in found.values()} == {(3, 2)}
    rows = features(NoisePrediction(1, x, uncond, cond[0], 0.9, 0.4, "epsilon"))
    d, u = (cond[0, 1] - uncond[1]).flatten(), uncond[1].flatten()
    assert rows["norm"][1].item() == pytest.approx(d.norm().item())
    assert rows["cos_vector"][1].item() == pytest.approx((d @ u / d.norm() / u.norm()).item(), rel=1e-4)
    for name in FEATURES:
        assert torch.allclose(rows[name], found[name][0])


def test_all_detectors_cost_little_more_than_the_dearest():
    """Evaluations of a prompt counted at fifty steps; the dearest is at least as dear as the one that is named here."""
    pipe = load_tiny("tiny-eps")
    able, _ = split_able(pipe, make_detectors(["all"], {}))

    def counted(detectors):
        scorer = Scorer(pipe, detectors, noises=1, seed=51, steps=50, batch_size=32)
        with counted_rows(pipe.unet) as counter:
            scorer(["red kite"])
        return counter.rows

    assert counted(make_detectors(["trajectory_norm"], {})) == 100
    assert counted(make_detectors(["anisotropy"], {})) == 2
    assert counted(able) <= 1.15 * counted(make_detectors(["p_laplace"], {}))


def test_detectors_that_take_differences_refuse_half_precision():
    pipe = load_tiny("tiny-eps", "bfloat16")
    detectors = make_detectors(["sharpness", "flipd", "noise_norm"], {})
    with pytest.raises(InputError, match="sharpness, flipd: small differences drown"):
        Scorer(pipe, detectors, noises=1, seed=0, steps=50, batch_size=4)
    with pytest.raises(InputError, match="flipd: small differences drown"):
        PictureScorer(pipe, detectors[1:2], batch_size=4)


def test_settings_by_name():
    (detector,) = make_detectors(["p_laplace"], {"p_laplace": {"timestep": 50}})
    assert detector.timestep == 50
    with pytest.raises(InputError, match="p_laplace has no setting 'time'; it has: power, timestep, points, seed"):
        make_detectors(["p_laplace"], {"p_laplace": {"time": 50}})


@pytest.fixture
def labelled(tmp_path):
    path = tmp_path / "labelled.jsonl"
    rows = [{"prompt": f"thing {i}", "label": i % 2, "family": f"f{i}", "split": ["validation", "test"][i // 6]}
            for i in range(12)]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def call(monkeypatch, module, *arguments):
    monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, arguments)])
    module.main()


def test_timestep_sweep_agrees_with_the_detector(monkeypatch, labelled, tmp_path, capsys):
    common = ("--model", GOLDEN / "tiny-eps", "--prompts", labelled, "--dtype", "float32", "--device", "cpu")
    call(monkeypatch, timestep_sweep, *common, "--out", tmp_path / "sweep", "--every", 25)
    table = pd.read_csv(tmp_path / "sweep" / "table.csv")
    assert set(table["t"]) == {981, 481, 41, 1} and set(table["latents"]) == {"noise", "generation"}
    pair = [table[(table["latents"] == kind) & (table["t"] == 981) & (table["feature"] == "norm")]["auc"].item()
            for kind in ("noise", "generation")]  # fmt: skip
    assert pair[0] == pytest.approx(pair[1])  # a generation starts on the same noise
    assert (tmp_path / "sweep" / "sweep.png").stat().st_size > 1000 and "6 prompts" in capsys.readouterr().out
    with pytest.raises(InputError, match="at least 1"):
        call(monkeypatch, timestep_sweep, *common, "--every", 0)


def test_fusion_finds_the_planted_pair():
    rng = np.random.default_rng(0)
    labels = np.arange(120) % 2
    hidden = rng.normal(0, 3, 120)
    columns = {"norm@0": labels + hidden, "turn@30": hidden, "cos_noise@5": rng.normal(0, 1, 120)}
    rows = [
        {"label": int(labels[i]), "family": f"f{i}", **{f"noise/{key}": [values[i]] for key, values in columns.items()}}
        for i in range(120)
    ]
    table = fusion.pairs(rows)
    best = table.iloc[0]
    assert {best["first"], best["second"]} == {"norm@0", "turn@30"} and best["auc"] > 0.99
    assert best["first weight"] == pytest.approx(1) and best["second weight"] == pytest.approx(-1, abs=0.1)


def test_fusion_learns_nothing_from_a_prompts_own_family():
    rng = np.random.default_rng(0)
    families = np.repeat(np.arange(30), 4)
    labels, values = (families % 2), rng.normal(0, 1, (30, 2))[families]
    auc = np.trapezoid(*fusion.roc(labels, fusion.out_of_fold(values, labels, families))[::-1])
    assert auc < 0.7


def test_p_laplace_sweep_holds_the_detector(monkeypatch, labelled, tmp_path):
    assert max(p_laplace_sweep.POINTS) == PLaplace().points
    monkeypatch.setattr(p_laplace_sweep, "POINTS", (4, 8))
    call(monkeypatch, p_laplace_sweep, "--model", GOLDEN / "tiny-eps", "--prompts", labelled, "--device", "cpu",
         "--dtype", "float32", "--out", tmp_path / "sweep", "--each", 2, "--timesteps", 10)  # fmt: skip
    rows = [json.loads(line) for line in (tmp_path / "sweep" / "scores.jsonl").read_text().splitlines()]
    assert sorted(row["label"] for row in rows) == [0, 0, 1, 1]
    pipe = load_tiny("tiny-eps")
    detectors = make_detectors(["p_laplace"], {"p_laplace": {"points": 8}})
    scorer = Scorer(pipe, detectors, noises=1, seed=51, steps=50, batch_size=32)
    (values,) = scorer([rows[0]["prompt"]])
    assert rows[0]["prompt/p1/t10/N8"] == pytest.approx(values["p_laplace_prompt"], rel=1e-3)
    assert rows[0]["none/p1/t10/N8"] == pytest.approx(values["p_laplace"], rel=1e-3)


def test_sequential_study_compares_with_fixed_numbers():
    rng = np.random.default_rng(0)
    labels = np.arange(400) % 2
    rows = pd.DataFrame({
        "label": labels, "family": [f"f{i}" for i in range(400)], "split": ["validation", "test"] * 200,
        "noise_norm": list(2.0 * labels[:, None] + rng.normal(0, 1.5, (400, 8))),
    })  # fmt: skip
    rows["split"] = np.where(np.arange(400) < 200, "validation", "test")
    table = sequential.study(rows, "noise_norm", 1, 0.05, 100).set_index("mode")
    assert table.loc["fixed n = 8", "auc value"] > table.loc["fixed n = 1", "auc value"]
    careful = table.loc["sequential, risk 0.01"]
    assert careful["noises"] < 8 and careful["auc value"] > table.loc["fixed n = 2", "auc value"]


def test_audit_of_a_list_and_of_the_published_ones(monkeypatch, tmp_path, capsys):
    frame = pd.DataFrame({
        "prompt": [f"Big Red Item {i}" for i in range(10)] + [f"a small green thing number {i * 7}" for i in range(10)],
        "label": [1] * 10 + [0] * 10, "family": ["same"] * 5 + [f"f{i}" for i in range(15)],
    })  # fmt: skip
    assert benchmark_audit.effective_number(frame["family"][:10].to_numpy()) == pytest.approx(100 / 30)
    frame.to_csv(tmp_path / "mine.csv", index=False)
    call(
        monkeypatch, benchmark_audit, "--prompts", tmp_path / "mine.csv", "--resamples", 100, "--out", tmp_path / "out"
    )
    row = pd.read_csv(tmp_path / "out" / "separation.csv").iloc[0]
    assert row["capitals AUC"].startswith("1.000") and row["families of positives"] == 6
    with pytest.raises(InputError, match="prompts fetch"):
        call(monkeypatch, benchmark_audit, "--lists", tmp_path)
    assert set(name for pair in benchmark_audit.PUBLISHED.values() for name in pair) <= set(PUBLISHED)
