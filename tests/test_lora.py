"""Adapters: put on and taken off, changed without data, and trained on the tiny pipeline."""

import json
import shutil

import audited
import numpy as np
import pytest
import torch
from audited import TINY, layers
from conftest import load_tiny
from faults import refused
from safetensors.torch import load_file, save_file

from memorization import cli
from memorization.errors import InputError
from memorization.models.lora import Layer, aligned, base_weight, read_layers, save_layers, scaled, wearing
from testbed.fit import SAVE_EVERY
from testbed.lora import Recipe, repeated, train


@pytest.fixture(scope="module")
def pipe():
    return load_tiny("tiny-eps")


@pytest.fixture
def file(pipe, tmp_path):
    save_file(layers(pipe, 1.0), tmp_path / "one.safetensors")
    return tmp_path / "one.safetensors"


@torch.no_grad()
def predicted(pipe):
    return pipe.predict_noise(pipe.pure_noise(1, 0), 981, pipe.embed(["kite"]))


def merged(found):
    """A pipeline with an adapter's layers added to its weights by hand."""
    pipe = load_tiny("tiny-eps")
    for stem, layer in found.items():
        module = pipe.unet.get_submodule(stem.removeprefix("unet."))
        module.weight.data += layer.up @ layer.down
    return pipe


def test_an_adapter_is_its_layers_added_and_leaves_no_trace(pipe, file):
    before = predicted(pipe)
    with wearing(pipe, file):
        with_it = predicted(pipe)
    assert torch.equal(predicted(pipe), before)
    assert torch.allclose(with_it, predicted(merged(read_layers(file))), atol=1e-5) and not torch.equal(with_it, before)


def test_dropout_is_for_training(pipe, file, tmp_path):
    tensors = load_file(file)
    (rank,) = {tensor.shape[0] for key, tensor in tensors.items() if "lora_A" in key}
    targets = sorted({key.removeprefix("unet.").partition(".lora_")[0] for key in tensors})
    noted = {"r": rank, "lora_alpha": rank, "lora_dropout": 0.5, "target_modules": targets}
    metadata = {"lora_adapter_metadata": json.dumps({f"unet.{key}": value for key, value in noted.items()})}
    save_file(tensors, tmp_path / "dropout.safetensors", metadata=metadata)
    with wearing(pipe, tmp_path / "dropout.safetensors"):
        dropouts = [module.p for module in pipe.unet.modules() if isinstance(module, torch.nn.Dropout) and module.p]
        assert set(dropouts) == {0.5}
        assert torch.equal(predicted(pipe), predicted(pipe))


def test_kohya_and_diffusers_names_mean_the_same(pipe, file, tmp_path):
    tensors = load_file(file)
    kohya = {}
    for name, tensor in tensors.items():
        stem = name.removeprefix("unet.").partition(".lora_")[0].replace(".", "_")
        kohya[f"lora_unet_{stem}.lora_{'down' if 'lora_A' in name else 'up'}.weight"] = tensor
        kohya[f"lora_unet_{stem}.alpha"] = torch.tensor(2.0)  # of rank 4: half of it
    save_file(kohya, tmp_path / "kohya.safetensors")
    with wearing(pipe, tmp_path / "kohya.safetensors"):
        found = predicted(pipe)
    assert torch.allclose(found, predicted(merged(scaled(read_layers(file), 0.5))), atol=1e-5)
    halved = read_layers(tmp_path / "kohya.safetensors")
    for stem, layer in read_layers(file).items():
        assert torch.allclose(halved[stem].up @ halved[stem].down, layer.up @ layer.down / 2, atol=1e-6)


def test_a_text_encoder_is_adapted_and_changed_too(pipe, tmp_path):
    kohya, generator = {}, torch.Generator().manual_seed(1)
    for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
        out, into = pipe.text_encoder.get_submodule(f"encoder.layers.0.self_attn.{name}").weight.shape
        stem = f"lora_te_text_model_encoder_layers_0_self_attn_{name}"
        kohya[f"{stem}.lora_down.weight"] = torch.randn(2, into, generator=generator)
        kohya[f"{stem}.lora_up.weight"] = torch.randn(out, 2, generator=generator)
        kohya[f"{stem}.alpha"] = torch.tensor(1.0)
    save_file({**kohya}, tmp_path / "text.safetensors")
    with torch.no_grad(), wearing(pipe, tmp_path / "text.safetensors"):
        found = pipe.embed(["kite"])
    assert torch.linalg.vector_norm(found - pipe.embed(["kite"])) > 0.1
    changed = aligned(read_layers(tmp_path / "text.safetensors"), pipe, 1.0)
    save_layers(changed, tmp_path / "same.safetensors")
    with torch.no_grad(), wearing(pipe, tmp_path / "same.safetensors"):
        assert torch.allclose(pipe.embed(["kite"]), found, atol=1e-4)


def test_scaling_is_linear_and_a_saved_adapter_is_the_same(pipe, file, tmp_path):
    cli.dispatch(["adapter", str(file), "--scale", "0.25", "--out", str(tmp_path / "weak.safetensors")])
    weak, full = read_layers(tmp_path / "weak.safetensors"), read_layers(file)
    for stem in full:
        assert torch.allclose(weak[stem].up @ weak[stem].down, 0.25 * full[stem].up @ full[stem].down, atol=1e-6)
    with wearing(pipe, tmp_path / "weak.safetensors"):
        assert torch.allclose(predicted(pipe), predicted(merged(scaled(full, 0.25))), atol=1e-5)


def test_directions_that_the_base_does_not_know_go_first(pipe):
    stem = next(iter(layers(pipe, 1.0))).partition(".lora_A")[0]
    left, _, right = torch.linalg.svd(base_weight(pipe, stem), full_matrices=False)
    known, unknown = torch.outer(left[:, 0], right[0]), torch.outer(left[:, -1], right[-1])
    layer = Layer(torch.stack([right[0], right[-1]]), torch.stack([left[:, 0], 3 * left[:, -1]], 1))
    assert torch.allclose(layer.up @ layer.down, known + 3 * unknown, atol=1e-5)
    kept = aligned({stem: layer}, pipe, 0.5, energy=0.5)[stem]
    assert torch.allclose(kept.up @ kept.down, known, atol=1e-5) and kept.down.shape[0] == 1  # though it is the smaller
    whole = aligned({stem: layer}, pipe, 1.0)[stem]
    assert torch.allclose(whole.up @ whole.down, layer.up @ layer.down, atol=1e-5)


def test_bad_changes_are_one_line(file, tmp_path):
    out = str(tmp_path / "new.safetensors")
    refused(lambda: cli.dispatch(["adapter", str(file), "--out", out]), "give --scale or --keep")
    refused(lambda: cli.dispatch(["adapter", str(file), "--keep", "0.5", "--out", out]), "go together")
    refused(lambda: cli.dispatch(["adapter", str(file), "--scale", "1", "--out", "x.bin"]), "only safetensors")
    refused(lambda: cli.dispatch(["adapter", str(file), "--scale", "1", "--out", str(file)]), "exists already")
    save_layers({"unet.nowhere": Layer(torch.ones(1, 4), torch.ones(4, 1))}, tmp_path / "odd.safetensors")
    odd = str(tmp_path / "odd.safetensors")
    refused(lambda: cli.dispatch(["adapter", odd, "--keep", "1", "--base", TINY, "--out", out]), "no layer")


# ---------------------------------------------------------------- the testbed


def test_half_of_a_set_is_repeated():
    assert repeated(8, 0).sum() == 4 and repeated(9, 0).sum() == 4
    assert (repeated(8, 0) == repeated(8, 0)).all() and (repeated(8, 1) != repeated(8, 0)).any()


def test_a_killed_training_goes_on_to_the_same_bytes(pipe, file, tmp_path, monkeypatch):
    audited.save_training(tmp_path / "set", file)
    monkeypatch.setattr("testbed.fit.SAVE_EVERY", 3)
    recipe = Recipe(rank=2, repeats=4, steps=8, epochs=4, batch=2, peak=1e-2)
    whole = train(TINY, tmp_path / "set", recipe, tmp_path / "whole")
    assert [path.name for path in whole] == [f"set-00000{i}.safetensors" for i in (1, 2, 3, 4)]

    def killed(step):
        raise KeyboardInterrupt

    from testbed import lora

    plain = lora.loss_on
    monkeypatch.setattr(lora, "loss_on", lambda *a: lambda step: killed(step) if step == 5 else plain(*a)(step))
    with pytest.raises(KeyboardInterrupt):
        train(TINY, tmp_path / "set", recipe, tmp_path / "killed")
    monkeypatch.setattr(lora, "loss_on", plain)
    again = train(TINY, tmp_path / "set", recipe, tmp_path / "killed")
    assert [path.read_bytes() for path in again] == [path.read_bytes() for path in whole]
    assert len({path.read_bytes() for path in whole}) == 4
    listed = json.loads((tmp_path / "whole" / "set.json").read_text())["pictures"]
    assert sum(one["repeated"] for one in listed) == 2
    with wearing(pipe, whole[-1]):  # what it saves, diffusers loads
        assert np.isfinite(predicted(pipe)).all()


def test_a_whole_fine_tune_is_a_checkpoint(file, tmp_path):
    audited.save_training(tmp_path / "set", file)
    assert SAVE_EVERY > 2
    states = train(TINY, tmp_path / "set", Recipe(full=True, steps=2, epochs=2, batch=2), tmp_path / "out")
    assert [path.name for path in states] == ["set-000001", "set-000002"]
    shutil.rmtree(tmp_path / "out" / "work")
    cli.dispatch(["audit", *audited.FLAGS, "--paraphrases", "0", "--adapter", str(tmp_path / "out" / "epochs"),
                  "--training", str(tmp_path / "set"), "--out", str(tmp_path / "audit")])  # fmt: skip
    assert [one["name"] for one in audited.numbers(tmp_path / "audit")["epochs"]][1:] == ["set-000001", "set-000002"]


def test_a_dora_is_refused(pipe, file, tmp_path):
    tensors = load_file(file)
    first = next(name for name in tensors if "lora_A" in name)
    magnitudes = {first.replace("lora_A.weight", "lora_magnitude_vector"): torch.ones(4)}
    save_file({**tensors, **magnitudes}, tmp_path / "dora.safetensors")
    with pytest.raises(InputError, match="a DoRA"), wearing(pipe, tmp_path / "dora.safetensors"):
        pass
