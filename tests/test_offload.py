"""Offloaded networks: the same scores, and weights that are elsewhere between calls.

There is no second device here. While networks wait, what their tensors held lies in a dict, and NaN in its place (0
where there is none): a part that is used without having been brought has other scores, or none.
"""

import json
import re
from types import SimpleNamespace

import pytest
import tiny_families
import torch
from audited import layers
from conftest import GOLDEN, load_tiny
from diffusers.hooks.group_offloading import ModuleGroup
from safetensors.torch import save_file
from torch import nn

import memorization as mem
from memorization.cli.calibrate import main as calibrate_command
from memorization.cli.detect import main as detect_command
from memorization.errors import InputError
from memorization.flags import run_script
from memorization.models import loading, offload

AWAY = torch.device("meta")  # the name of that place
PROMPTS = ["a red kite", ""]
OPTIONS = {"device": "cpu", "dtype": "float32"}
REFUSED = "--offload group: .* takes derivatives of the denoiser, .*; give --offload model"
NAMES = ("stable_diffusion", "sdxl", "sd3", "pixart", "flux")


class Elsewhere:
    """A place for tensors, and what they held before they went there."""

    def __init__(self):
        self.held = {}

    def take(self, tensors):
        for one in tensors:
            if one not in self.held:  # weights that two layers share go once
                self.held[one] = one.data
                nothing = torch.tensor(float("nan") if one.is_floating_point() else 0, dtype=one.dtype)
                one.data = nothing.expand(one.shape)

    def give(self, tensors):
        for one in tensors:
            one.data = self.held.pop(one, one.data)

    def move(self, network, *args, **kwargs):
        """As ``nn.Module.to``."""
        if not (args and isinstance(args[0], torch.device)):
            return nn.Module.to(network, *args, **kwargs)
        (self.take if args[0] == AWAY else self.give)([*network.parameters(), *network.buffers()])
        return network

    def of(self, network):
        """How many of a network's weights are here: all, some, or none."""
        away = {one in self.held for one in network.parameters()}
        return "some" if len(away) > 1 else "none" if True in away else "all"


def tensors_of(group):
    whole = [one for module in group.modules for one in (*module.parameters(), *module.buffers())]
    return [*whole, *group.parameters, *group.buffers]


@pytest.fixture
def elsewhere(monkeypatch):
    """Networks wait elsewhere, and the CPU is the card."""
    place = Elsewhere()
    monkeypatch.setattr(offload, "WAITING", AWAY)
    monkeypatch.setattr(ModuleGroup, "offload_", lambda group: place.take(tensors_of(group)))
    monkeypatch.setattr(ModuleGroup, "onload_", lambda group: place.give(tensors_of(group)))

    def put(pipe, *args):
        for one in pipe.components.values():
            if isinstance(one, nn.Module):
                one.to = lambda *args, one=one, **kwargs: place.move(one, *args, **kwargs)
        offload.put(pipe, *args)

    monkeypatch.setattr(loading, "put", put)
    return place


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The tiny pipelines as folders, made when they are asked for."""
    return tiny_families.saved_in(tmp_path_factory.mktemp("offload"), stable_diffusion=GOLDEN / "tiny-eps")


def scores(model, *detectors, prompts=PROMPTS):
    names = detectors or ("noise_norm", "anisotropy", "trajectory_norm")
    frame = mem.score(model, prompts, detectors=names, steps=3, batch_size=2)
    return [value for name in names for row in frame[name] for value in row]


@pytest.mark.parametrize("how", ["model", "group"])
@pytest.mark.parametrize("name", NAMES)
def test_scores_are_the_same_and_weights_elsewhere_between_calls(folders, elsewhere, name, how):
    expected = scores(mem.load(folders(name), **OPTIONS))
    model = mem.load(folders(name), offload=how, **OPTIONS)
    pipe, denoiser, text = model.pipe, model.pipe.denoiser, model.pipe.text_encoder
    # In the other format of its weights, a UNet's last bits are others.
    near = 1e-4 if how == "group" and hasattr(loading.pipeline_of(model), "unet") else 0
    assert scores(model) == pytest.approx(expected, rel=near, abs=0)
    assert pipe.device == torch.device("cpu") and model.where == {"device": "cpu", "offload": how}
    embeds = pipe.embed(["kite"])
    last = getattr(loading.pipeline_of(model), "text_encoder_2", text)
    called = "all" if how == "model" else "none"
    assert (elsewhere.of(denoiser), elsewhere.of(last), elsewhere.of(pipe.vae)) == ("none", called, "all")
    assert last is text or elsewhere.of(text) == "none"
    pipe.predict_noise(pipe.pure_noise(1, 0), pipe.detection_timesteps(4)[0], embeds)
    assert (elsewhere.of(denoiser), elsewhere.of(last), elsewhere.of(text)) == (called, "none", "none")


@pytest.mark.parametrize("how", ["model", "group"])
@pytest.mark.parametrize("method", ["rna", "nemo", "attention_rescale"])
def test_mitigations_that_touch_parts_of_a_network(folders, elsewhere, how, method):
    """Words, value layers by themselves, attention, and pictures."""
    settings = {"nemo": {"target": 1e-6}}.get(method)
    made = []
    for offloaded in ("none", how):
        model = mem.load(folders("stable_diffusion"), offload=offloaded, **OPTIONS)
        made.append(mem.mitigate(model, PROMPTS[:1], method, settings=settings, noises=1, steps=3, clip="none"))
    assert (abs(made[0].after.astype(int) - made[1].after) <= 1).all()
    assert (made[0].after != made[0].before).any()


def test_derivatives_need_whole_networks(folders, elsewhere):
    plain, whole, layers = (mem.load(folders("sd3"), offload=how, **OPTIONS) for how in ("none", "model", "group"))

    def moved(model):
        settings = {"target": 1e-6, "iterations": 2}
        return mem.mitigate(model, PROMPTS[:1], "noise_norm", settings=settings, noises=1, steps=3, clip="none").frame

    assert moved(whole)["score_after"].tolist() == (after := moved(plain))["score_after"].tolist()
    assert after["score_after"].tolist() != after["score_before"].tolist()
    with pytest.raises(InputError, match=REFUSED):
        moved(layers)

    def sharpness(model):  # in forward mode
        settings = {"sharpness": {"method": "exact"}}
        return mem.score(model, PROMPTS, detectors=["sharpness"], settings=settings, steps=3)["sharpness"].tolist()

    assert sharpness(whole) == sharpness(plain)
    with pytest.raises(InputError, match=REFUSED):
        sharpness(layers)


@pytest.mark.parametrize("how", ["model", "group"])
def test_a_quantized_transformer(folders, elsewhere, tmp_path, how):
    test_gguf = pytest.importorskip("test_gguf")
    weights = test_gguf.as_published(tiny_families.sd3().transformer.state_dict())
    path = test_gguf.write(tmp_path / "sd3.gguf", weights, test_gguf.Q8_0)
    expected = scores(mem.load(path, config=folders("sd3"), **OPTIONS))
    model = mem.load(path, config=folders("sd3"), offload=how, **OPTIONS)
    assert scores(model) == expected
    assert model.pipe.denoiser.transformer_blocks[0].ff.net[2].weight.dtype == torch.uint8
    assert elsewhere.of(model.pipe.denoiser) == ("all" if how == "model" else "none")


@pytest.mark.parametrize("how", ["model", "group"])
def test_adapters_come_and_go_with_their_layers(folders, elsewhere, tmp_path, how):
    save_file(layers(load_tiny("tiny-eps"), 1.0), tmp_path / "lora.safetensors")
    options = {**OPTIONS, "adapters": [(tmp_path / "lora.safetensors", 0.5)]}
    bare, worn, offloaded = (scores(mem.load(folders("stable_diffusion"), **given), prompts=PROMPTS[:1])
                             for given in (OPTIONS, options, {**options, "offload": how}))  # fmt: skip
    assert offloaded == pytest.approx(worn, rel=1e-4) and worn != pytest.approx(bare, rel=1e-2)


def test_the_commands_and_their_records(folders, elsewhere, tmp_path):
    """A run may be gone on with under another: no score depends on it."""
    (tmp_path / "p.txt").write_text("a kite\nboats\nold clock\nwhite horse\nriver\n")
    common = ["--model", str(folders("stable_diffusion")), "--prompts", str(tmp_path / "p.txt"), "--dtype", "float32",
              "--device", "cpu", "--steps", "4", "--batch-size", "2"]  # fmt: skip
    rows, thresholds = [], []
    for out, how in (("none", ()), ("model", ("--offload", "model"))):
        detect_command([*common, "--out", str(tmp_path / out), *how])
        rows.append((tmp_path / out / "scores.jsonl").read_bytes())
        calibrate_command([*common, "--fpr", "0.5", "--out", str(tmp_path / "t.yaml"), *how])
        thresholds.append((tmp_path / "t.yaml").read_bytes())
    none, model = (json.loads((tmp_path / out / "run.json").read_text()) for out in ("none", "model"))
    assert rows[0] == rows[1] and thresholds[0] == thresholds[1] and none["settings"] == model["settings"]
    assert model["sessions"][0]["offload"] == "model" and "offload" not in none["sessions"][0]


@pytest.mark.parametrize("how", ["model", "group"])
def test_without_a_card_it_is_refused(folders, tmp_path, capsys, how):
    arguments = ["--model", str(folders("stable_diffusion")), "--device", "cpu", "--offload", how,
                 "--prompts", str(tmp_path / "p.txt")]  # fmt: skip
    (tmp_path / "p.txt").write_text("a kite\n")
    with pytest.raises(SystemExit) as ended:
        run_script(lambda: detect_command([*arguments, "--out", str(tmp_path / "none")]))
    said = capsys.readouterr().err
    assert ended.value.code == 2 and re.fullmatch(f"error: --offload {how}: cpu is where .*; it needs a card\n", said)
    with pytest.raises(InputError, match="offload = 'disk': is none of none, model, group"):
        mem.load(folders("stable_diffusion"), offload="disk")


def test_what_diffusers_cannot_offload_in_layers():
    network = nn.Linear(1, 1)
    network._supports_group_offloading = False
    with pytest.raises(InputError, match="--offload group: diffusers has none for Linear; give --offload model"):
        offload.put(SimpleNamespace(components={"part": network}), torch.device("cpu"), "group")


@pytest.mark.parametrize("where", ["ready", "replayed"])
def test_a_model_that_does_not_fit_is_told_the_flag(folders, monkeypatch, where):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    if where == "ready":
        monkeypatch.setattr(loading, "ready", full)
    else:
        monkeypatch.setattr(nn.Module, "__call__", full)
    with pytest.raises(InputError, match=r"sd3: does not fit into the memory of cpu; try --offload model, or group"):
        mem.load(folders("sd3"), **OPTIONS)
