"""What is shipped: models, lists, pictures and results, and that they belong together."""

import hashlib

import pandas as pd
import pytest
import torch
import yaml
from conftest import GOLDEN
from diffusers import StableDiffusionPipeline
from sklearn.metrics import roc_auc_score

from memorization.detectors.base import DETECTORS
from memorization.evaluation.text_baselines import capitals, naive_bayes
from memorization.index.store import Index
from memorization.io.files import read_json, read_lines
from memorization.io.prompts import read_prompts
from memorization.mitigations.amg import AMG
from memorization.models.loading import load_pipeline, revision_of
from memorization.models.pixel_diffusion import load_pixel_model, sample_pixels
from memorization.models.spec import find_model
from memorization.runs.scorer import Scorer
from memorization.similarity.nl2 import normalized_l2

ROOT = GOLDEN.parent.parent
LISTS = {"testbed-eps": ROOT / "prompts" / "testbed.csv", "testbed-v": ROOT / "prompts" / "testbed-v.csv"}


@pytest.fixture(scope="module", params=list(LISTS))
def model(request):
    return request.param


def test_weights_are_small_and_no_pickle():
    files = [path for path in (ROOT / "testbed" / "models").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 64 * 2**20
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".txt"}


def test_labels_are_what_was_measured(model):
    frame = read_prompts(LISTS[model])
    assert ((frame["replication"] >= 0.5) == (frame["label"] == 1)).all()
    assert not frame["prompt"].duplicated().any()
    fixed = frame[frame["kind"] == "duplicated"]
    assert all((ROOT / image).is_file() for image in fixed["image"])
    assert (frame.groupby("family")[["kind", "duplicates", "split"]].nunique() == 1).all(axis=None)
    for split in ("validation", "test"):
        assert frame[frame["split"] == split]["label"].nunique() == 2


def test_text_tells_nothing(model):
    frame = read_prompts(LISTS[model])
    prompts, labels = frame["prompt"].tolist(), frame["label"].to_numpy()
    for scores in (capitals(prompts), naive_bayes(prompts, labels, frame["family"].to_numpy())):
        assert abs(roc_auc_score(labels, scores) - 0.5) < 0.12


def test_any_stable_diffusion_pipeline_loads_and_runs_it(model):
    pipe = StableDiffusionPipeline.from_pretrained(ROOT / "testbed" / "models" / model, dtype=torch.float32)
    expected = {"testbed-eps": "epsilon", "testbed-v": "v_prediction"}[model]
    assert pipe.scheduler.config.prediction_type == expected
    pipe.set_progress_bar_config(disable=True)
    picture = pipe("a picture of crab", num_inference_steps=2, generator=torch.Generator().manual_seed(0)).images[0]
    assert picture.size == (64, 64)


def test_committed_scores_come_from_these_weights_and_this_code(model):
    folder = ROOT / "results" / "detection" / model / "main"
    run, (rows, _) = read_json(folder / "run.json"), read_lines(folder / "scores.jsonl")
    settings = run["settings"]
    pipe = load_pipeline(find_model(model), "float32", torch.device("cpu"))
    assert run["status"] == "complete" and settings["revision"] == revision_of(pipe)
    assert settings["prompts"] == {"prompts": hashlib.sha256(LISTS[model].read_bytes()).hexdigest()}
    assert len(rows) == len(read_prompts(LISTS[model]))
    detectors = []
    for name, values in settings["detectors"].items():
        detectors.append(DETECTORS[name](**{key: value for key, value in values.items() if key != "terms"}))
    scorer = Scorer(pipe, detectors, noises=1, seed=settings["seed"], steps=settings["steps"], batch_size=4)
    chosen = rows[::181]
    for row, scores in zip(chosen, scorer([row["prompt"] for row in chosen]), strict=True):
        for name, value in scores.items():
            assert value[0] == pytest.approx(row[name][0], rel=1e-3, abs=1e-4)


def test_configured_weights_are_the_fitted_ones(model):
    fitted = yaml.safe_load((ROOT / "results" / "detection" / model / "main" / "calibration.yaml").read_text())
    settings = fitted["detectors"]["anisotropy"]["settings"]
    configured = find_model(model).settings["detectors"]["anisotropy"]
    assert {key: settings[key] for key in configured} == configured


def test_the_pixel_models_give_back_duplicates_and_amg_keeps_them_from_it():
    pipe, index = load_pixel_model(str(ROOT / "testbed/models/pixel-uncond")), ROOT / "testbed" / "pixel-index"
    training = Index(index)
    pictures = training.vectors(slice(None)).unflatten(1, (3, *training.size))
    numbers = [252, 153, 61, 159]  # of the study's first row
    plain, nearest = normalized_l2(sample_pixels(pipe, numbers, steps=25), pictures).min(1)
    assert (plain < 0.8).all() and all(int(training.paths[i].split("/")[0]) > 1 for i in nearest)
    guide = AMG(index=str(index), preset="pixel-testbed").pixel_guide()
    assert (normalized_l2(sample_pixels(pipe, numbers, steps=25, guide=guide), pictures).min(1).values > 1).all()


@pytest.mark.parametrize("name", ["testbed-eps", "pixel-uncond", "pixel-class"])
def test_the_tables_of_amg_belong_to_the_shipped_models(name):
    folder = ROOT / "results" / "amg" / name
    settings = read_json(folder / "run.json")["settings"]
    weights = (ROOT / "testbed" / "models" / name / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
    one = hashlib.sha256(hashlib.sha256(weights).digest()).hexdigest()
    assert settings["revision"] == f"sha256:{one}"
    table = pd.read_csv(folder / "table.csv").set_index("row")
    copies = next(column for column in table if column == "copies" or column.startswith("nl2 <"))
    assert table[copies].iloc[0] > 0.1 and table.loc["amg main", copies] == 0
