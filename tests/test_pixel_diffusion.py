"""Sampling in pixel space: no batch matters, a closed gate changes nothing, an open one keeps away from the index."""

import numpy as np
import pandas as pd
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from PIL import Image

from memorization.errors import InputError
from memorization.index.build import build_index
from memorization.index.store import Index
from memorization.io.pictures import to_bytes
from memorization.mitigations.amg import AMG
from memorization.models.pixel_diffusion import load_pixel_model, sample_pixels
from memorization.similarity.nl2 import normalized_l2
from memorization.studies import amg_pixel
from memorization.studies.amg import gates


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4, num_class_embeds=3,
        down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"), add_attention=False,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("model")
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(folder)
    return load_pixel_model(str(folder))


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_a_picture_depends_on_its_number_alone(model, sampler):
    options = {"labels": torch.tensor([0, 1, 2, 0, 1]), "sampler": sampler, "steps": 5}
    whole = sample_pixels(model, range(5), **options)
    assert whole.shape == (5, 3, 8, 8) and whole.abs().max() <= 1
    part = sample_pixels(model, range(2, 4), **{**options, "labels": torch.tensor([2, 0])})
    assert torch.allclose(part, whole[2:4], atol=1e-5)
    assert not torch.allclose(sample_pixels(model, range(5), seed=1, **options), whole, atol=0.1)
    other = sample_pixels(model, range(5), **{**options, "labels": torch.tensor([1, 1, 2, 0, 1])})
    assert not torch.equal(other[0], whole[0]) and torch.allclose(other[1:], whole[1:], atol=1e-5)


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_amg_in_pixel_space(model, sampler, tmp_path):
    options = {"labels": torch.zeros(3, dtype=torch.long), "sampler": sampler, "steps": 10}
    plain = sample_pixels(model, range(3), **options)
    noise = torch.rand(60, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    (tmp_path / "training").mkdir()
    for i, picture in enumerate(to_bytes(torch.cat([plain[:2], noise]))):  # the first two pictures are "memorized"
        Image.fromarray(picture).save(tmp_path / "training" / f"{i:02d}.png")
    build_index(tmp_path / "training", tmp_path / "index", "pixels", (8, 8))
    amg = AMG(index=str(tmp_path / "index"), gate_start=1.0, gate_end=1.0, c3=5.0, every=1)
    guided = sample_pixels(model, range(3), guide=amg.pixel_guide(), **options)
    moved = (guided - plain).square().mean((1, 2, 3)).sqrt()
    assert (moved[:2] > 0.02).all() and torch.equal(guided[2], plain[2])
    training = Index(tmp_path / "index").vectors(slice(None)).unflatten(1, (3, 8, 8))
    before, after = (normalized_l2(pictures, training).diagonal()[:2] for pictures in (plain, guided))
    assert (before < 0.05).all() and (after > before + 0.05).all()
    closed = AMG(index=str(tmp_path / "index"), strength=1e-6)
    assert torch.equal(sample_pixels(model, range(3), guide=closed.pixel_guide(), **options), plain)


def test_comparison_in_pixel_space(model, run_script, tmp_path, capsys):
    rng = np.random.default_rng(0)
    (tmp_path / "training").mkdir()
    for i in range(60):
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(tmp_path / "training" / f"{i:02d}.png")
    rows = [{"file_name": f"{i:02d}.png", "prompt": f"class {i % 3}"} for i in range(60)]
    pd.DataFrame(rows).to_json(tmp_path / "training" / "metadata.jsonl", orient="records", lines=True)
    build_index(tmp_path / "training", tmp_path / "index", "pixels", (8, 8))
    out = tmp_path / "out"
    command = ("--model", model.config["_name_or_path"], "--index", tmp_path / "index", "--count", 12, "--steps", 3,
               "--preset", "paper-main", "--out", out)  # fmt: skip
    run_script(amg_pixel, *command)
    table = pd.read_csv(out / "table.csv").set_index("row")
    assert list(table.index) == ["none", "amg main", "amg strong", *gates("nl2")]
    assert (out / "sheet.png").stat().st_size > 1000
    assert (out / "no gate" / "0000-0.png").read_bytes() != (out / "none" / "0000-0.png").read_bytes()
    assert table.loc["amg main", "nl2 lowest"] > table.loc["none", "nl2 lowest"] > 0 and "clip" not in table
    made = {path: path.read_bytes() for path in out.glob("*/*.png")}
    assert len(made) == 12 * len(table)
    lines = (out / "scores.jsonl").read_text().splitlines(keepends=True)
    (out / "scores.jsonl").write_text("".join(lines[:15]) + lines[15][:9])  # as if it had been killed there
    (out / "constant gate" / "0003-0.png").unlink()
    run_script(amg_pixel, *command)
    assert {path: path.read_bytes() for path in out.glob("*/*.png")} == made
    assert len((out / "scores.jsonl").read_text().splitlines()) == len(lines)
    with pytest.raises(InputError, match="other settings"):
        run_script(amg_pixel, *command, "--seed", 1)
    with pytest.raises(InputError, match="holds a row 'amg main' of other settings"):
        run_script(amg_pixel, *command[:-3], "paper-strong", *command[-2:])


def test_what_is_no_model_is_refused(tmp_path):
    with pytest.raises(InputError, match="cannot be loaded as a DDPM"):
        load_pixel_model(str(tmp_path))
