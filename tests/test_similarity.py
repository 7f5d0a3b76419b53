"""Nearness of pictures."""

import shutil

import numpy as np
import pytest
import torch
from conftest import GOLDEN
from PIL import Image
from transformers import ResNetConfig, ResNetModel

from memorization.errors import InputError
from memorization.io.pictures import read_picture, to_tensor
from memorization.io.prompts import read_prompts
from memorization.similarity import frechet, nl2, sscd
from memorization.similarity.clip import Clip
from memorization.similarity.frechet import frechet_distance
from memorization.similarity.judge import Judge, TrainingPictures, is_copy
from memorization.similarity.nl2 import l2, normalized_l2, normalized_l2_to_nearest

ROOT = GOLDEN.parent.parent


def test_normalized_l2_by_hand():
    generator = torch.Generator().manual_seed(0)
    training = torch.rand(60, 3, 8, 8, generator=generator) * 2 - 1
    picture = torch.rand(1, 3, 8, 8, generator=generator) * 2 - 1
    distances = (training - picture).numpy().reshape(60, -1)
    distances = np.sqrt((distances**2).mean(axis=1)) / 2
    np.testing.assert_allclose(l2(picture, training)[0], distances, rtol=1e-5)
    expected = distances / (0.5 * np.sort(distances)[:50].mean())
    np.testing.assert_allclose(normalized_l2(picture, training)[0], expected, rtol=1e-5)


def test_bytes_are_as_good_as_floats(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    training = torch.randint(0, 256, (70, 3, 8, 8), generator=generator, dtype=torch.uint8)
    picture = torch.rand(2, 3, 8, 8, generator=generator) * 2 - 1
    expected = normalized_l2(picture, training.float() / 127.5 - 1)
    monkeypatch.setattr(nl2, "CHUNK", 5 * 192)  # five rows at once
    assert torch.equal(normalized_l2(picture, training), expected)


def test_exact_copy_is_zero_and_others_are_about_two():
    training = torch.randn(80, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    distance = normalized_l2(training[:2], training)
    assert distance[0, 0] < 1e-6 and 1.8 < distance[0, 1:].mean() < 2.3


def test_sscd_says_how_to_get_its_weights(monkeypatch):
    monkeypatch.setenv("SSCD_ONNX", "/nowhere.onnx")
    with pytest.raises(InputError, match="needs its weights"):
        sscd.SSCD()


def test_sscd_presets_prepare_pictures_their_way():
    picture = np.random.default_rng(0).integers(0, 256, (300, 600, 3), dtype=np.uint8)
    seen = {name: sscd.prepare(to_tensor(picture[None]), preset) for name, preset in sscd.PRESETS.items()}
    assert {name: tuple(pixels.shape[2:]) for name, pixels in seen.items()} == {
        "official-288": (288, 576),
        "bicubic-288": (288, 576),
        "official-320": (320, 320),
        "wen-224": (224, 224),
        "amg-224": (224, 224),
    }
    odd = torch.zeros(1, 3, 451, 300)
    assert sscd.prepare(odd, sscd.PRESETS["official-288"]).shape[2:] == (432, 288)  # 432.96, rounded down
    by_pillow = np.asarray(Image.fromarray(picture).resize((576, 288), Image.Resampling.BILINEAR)) / 255
    pixels = seen["official-288"][0].permute(1, 2, 0).numpy() * sscd.IMAGENET_STD + sscd.IMAGENET_MEAN
    assert np.abs(pixels - by_pillow).max() < 1.01 / 255 and np.abs(pixels * 255 % 1 - 0.5).min() > 0.49  # bytes
    for name, preset in sscd.PRESETS.items():
        flat = sscd.prepare(torch.full((1, 3, 300, 300), -0.6), preset)[0, :, 0, 0]  # .2 in [0, 1]
        assert flat.tolist() == pytest.approx((0.2 - np.array(preset.mean)) / np.array(preset.std), abs=1e-6), name
    with pytest.raises(InputError, match="no SSCD preset 'mine'"):
        sscd.SSCD("mine")


def test_sscd_network_is_the_folded_one():
    """Against the network whose normalisations are not folded, and pooling and linear layer by hand."""
    torch.manual_seed(0)
    whole = ResNetModel(ResNetConfig()).eval()
    for module in whole.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            for values, low, high in ((module.running_var, 0.5, 2), (module.running_mean, -0.2, 0.2),
                                      (module.weight, 0.3, 0.8), (module.bias, -0.2, 0.2)):  # fmt: skip
                torch.nn.init.uniform_(values, low, high)
    network = sscd.Network().eval()
    unfolded = sscd.Network()
    unfolded.trunk = whole
    folded = []
    for layer in unfolded.layers():
        norm = layer.normalization
        factor = norm.weight / (norm.running_var + norm.eps).sqrt()
        folded.append((layer.convolution.weight * factor[:, None, None, None], norm.bias - norm.running_mean * factor))
    linear = torch.randn(512, 2048) / 45, torch.randn(512) / 10
    network.load([tuple(v.detach().numpy() for v in pair) for pair in folded], tuple(v.numpy() for v in linear))
    pixels = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        states = whole(pixels).last_hidden_state.double().clamp_min(1e-6)
        pooled = (states**3).flatten(2).mean(2) ** (1 / 3)
        expected = pooled.float() @ linear[0].T + linear[1]
        assert torch.allclose(network(pixels), expected / expected.norm(dim=1, keepdim=True), atol=1e-5)


def test_frechet_distance_of_gaussians():
    """Between N(m, A) and N(0, B) with commuting A, B: |m|^2 + sum (sqrt a - sqrt b)^2."""
    rng = np.random.default_rng(0)
    a, b, mean = np.array([4.0, 1.0, 0.25]), np.array([1.0, 1.0, 1.0]), np.array([1.0, 0.0, 2.0])
    left, right = rng.normal(0, 1, (200_000, 3)) * np.sqrt(a) + mean, rng.normal(0, 1, (200_000, 3)) * np.sqrt(b)
    expected = 5.0 + np.square(np.sqrt(a) - np.sqrt(b)).sum()
    assert frechet_distance(left, right) == pytest.approx(expected, rel=0.02)
    assert frechet_distance(left, left) == pytest.approx(0, abs=1e-6)


def test_clip_score_knows_what_a_picture_shows():
    clip = Clip(str(ROOT / "testbed" / "models" / "clip"))
    frame = read_prompts(ROOT / "prompts" / "testbed.csv")
    frame = frame[frame["image"] != ""].iloc[::8]
    pictures = np.stack([read_picture(ROOT / path, (64, 64)) for path in frame["image"]])
    prompts = frame["prompt"].tolist()
    table = clip.pictures(pictures) @ clip.prompts(prompts).T
    assert (table.argmax(1) == torch.arange(len(prompts))).float().mean() > 0.8
    with pytest.raises(InputError, match=r"prompts: no config\.json in this folder; a CLIPModel"):
        Clip(str(ROOT / "prompts"))


@pytest.fixture(scope="module")
def known():
    """Sixty training pictures and their files."""
    paths = sorted((ROOT / "testbed" / "pictures").glob("*.png"))[:60]
    return TrainingPictures.read(paths, (64, 64))


def test_judge_measures_against_the_own_training_picture_or_else_the_nearest(known):
    judge, (first, second) = Judge(known), known.files[:2]
    pictures = known.pictures[:2]
    own = judge(pictures, "anything", first)["nl2"]
    assert own[0] == 0 and own[1] > 0.5
    table = normalized_l2(to_tensor(pictures), to_tensor(known.pictures))
    assert own == pytest.approx(table[:, 0].tolist(), abs=1e-4)
    assert judge(pictures)["nl2"] == [0, 0]
    half = known.pictures[:1] // 2 + known.pictures[3:4] // 2
    expected = normalized_l2(to_tensor(half), to_tensor(known.pictures)).min().item()
    assert judge(half)["nl2"][0] == pytest.approx(expected, abs=1e-4)
    assert (judge.training_picture(pictures[0]) == pictures[0]).all()
    assert (judge.training_picture(pictures[0], second) == pictures[1]).all()


def test_judge_leaves_out_what_it_lacks(known):
    few = Judge(TrainingPictures(known.pictures[:49], known.files[:49]))
    assert few(known.pictures[:2], "anything", known.files[0]) == {} and few.measures == []  # too few neighbours
    assert Judge(TrainingPictures.read([], (64, 64)))(known.pictures[:2], "anything") == {}


def test_judge_by_clip_knows_prompt_and_training_picture(known):
    clip = Clip(str(ROOT / "testbed" / "models" / "clip"))
    judge, pictures = Judge(known, clip), known.pictures[:3]
    values = judge(pictures, "a picture of crab", known.files[1])
    features = clip.pictures(known.pictures)
    assert values["clip_image"] == pytest.approx((features[:3] @ features[1]).tolist(), abs=1e-4)
    assert values["clip"] == pytest.approx((features[:3] @ clip.prompts(["a picture of crab"])[0]).tolist(), abs=1e-4)
    assert judge(pictures)["clip_image"] == pytest.approx([1, 1, 1], abs=1e-3) and "clip" not in judge(pictures)
    assert judge.measures == ["nl2", "clip_image", "clip"] and set(values) == set(judge.measures)


def test_judge_takes_further_measures(known):
    def length(pictures, prompt):
        return [len(prompt) + i for i in range(len(pictures))]

    judge = Judge(known, others={"length": length})
    assert judge(known.pictures[:3], "four")["length"] == [4, 5, 6] and judge.description["others"] == ["length"]


def test_a_copy_is_on_the_near_side():
    assert is_copy("nl2", np.array([1.0, 1.5]), 1.4).tolist() == [True, False]
    assert is_copy("sscd", np.array([0.6, 0.4]), 0.5).tolist() == [True, False]


def test_nearness_to_the_nearest_is_that_of_the_table():
    generator = torch.Generator().manual_seed(0)
    training, picture = (torch.rand(n, 48, generator=generator, dtype=torch.float64) for n in (70, 3))
    table = normalized_l2(picture, training)
    neighbours = training[l2(picture, training).topk(50, largest=False).indices]
    torch.testing.assert_close(normalized_l2_to_nearest(picture, neighbours).float(), table.min(1).values)


def test_frechet_distance_of_folders(run_script, tmp_path, capsys):
    pictures = sorted((ROOT / "testbed" / "pictures").glob("*.png"))
    for name, chosen in (("left", pictures[:6]), ("right", pictures[6:12])):
        (tmp_path / name).mkdir()
        for path in chosen:
            shutil.copy(path, tmp_path / name)
    clip = str(ROOT / "testbed" / "models" / "clip")
    run_script(frechet, tmp_path / "left", tmp_path / "right", "--features", clip)
    value = float(capsys.readouterr().out.split(": ")[-1])
    scorer = Clip(clip)
    left, right = (scorer.pictures(np.stack([read_picture(path, None) for path in part])).numpy()
                   for part in (pictures[:6], pictures[6:12]))  # fmt: skip
    assert value == pytest.approx(frechet_distance(left, right), rel=1e-3) and value > 0
    run_script(frechet, tmp_path / "left", tmp_path / "left", "--features", clip)
    assert float(capsys.readouterr().out.split(": ")[-1]) == pytest.approx(0, abs=1e-5)
    with pytest.raises(InputError, match="needs the package torch-fidelity"):
        run_script(frechet, tmp_path / "left", tmp_path / "right", "--features", "inception")
