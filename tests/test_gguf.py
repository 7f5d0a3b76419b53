"""Transformers in GGUF: the scores are those of a folder that has the file's numbers."""

import json
import re
import sys

import pytest
import tiny_families
import torch
from conftest import GOLDEN
from safetensors.torch import save_file

import memorization as mem
from memorization.cli.detect import main as detect_command
from memorization.errors import InputError
from memorization.flags import run_script
from memorization.io.files import sha256_of
from memorization.models import gguf as ours

gguf = pytest.importorskip("gguf")
F16, F32, BF16, Q8_0 = (gguf.GGMLQuantizationType[name] for name in ("F16", "F32", "BF16", "Q8_0"))
PROMPTS = ["a red kite", "two boats"]
OPTIONS = {"device": "cpu", "dtype": "float32"}
ENDS = {
    "pos_embed.pos_embed": "pos_embed", "pos_embed.proj": "x_embedder.proj", "norm_out.linear":
    "final_layer.adaLN_modulation.1", "proj_out": "final_layer.linear", "time_text_embed.timestep_embedder.linear_1":
    "t_embedder.mlp.0", "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0", "time_text_embed.text_embedder.linear_2":
    "y_embedder.mlp.2",
}  # fmt: skip
LAYERS = {
    "attn.to_q": "x_block.attn.qkv", "attn.to_k": "x_block.attn.qkv", "attn.to_v": "x_block.attn.qkv",
    "attn.add_q_proj": "context_block.attn.qkv", "attn.add_k_proj": "context_block.attn.qkv",
    "attn.add_v_proj": "context_block.attn.qkv", "attn.to_out.0": "x_block.attn.proj",
    "attn.to_add_out": "context_block.attn.proj", "norm1.linear": "x_block.adaLN_modulation.1",
    "norm1_context.linear": "context_block.adaLN_modulation.1", "ff.net.0.proj": "x_block.mlp.fc1",
    "ff.net.2": "x_block.mlp.fc2", "ff_context.net.0.proj": "context_block.mlp.fc1",
    "ff_context.net.2": "context_block.mlp.fc2",
}  # fmt: skip


def as_published(weights, last=1):
    """The weights of Stable Diffusion 3 as it was published, which is how GGUFs have them.

    Args:
        last: the block that reads the prompt for the last time; shift and scale are the other way round in it.
    """
    named = {}
    for key, value in weights.items():
        name, dot, kind = key.rpartition(".")
        if block := re.match(r"transformer_blocks\.(\d+)\.(.*)", name):
            old, place = f"joint_blocks.{block[1]}.{LAYERS[block[2]]}.{kind}", list(LAYERS).index(block[2])
        else:
            old, place = ENDS.get(key) or ENDS.get(name, name) + dot + kind, 0
        if name in (f"transformer_blocks.{last}.norm1_context.linear", "norm_out.linear"):
            value = torch.cat(value.chunk(2)[::-1])
        named.setdefault(old, {})[place] = value
    return {old: torch.cat([parts[place] for place in sorted(parts)]) for old, parts in named.items()}


def kind_of(weight, kind):
    """Quantizers leave alone what has no whole blocks, and norms and convolutions."""
    return F32 if kind is Q8_0 and (weight.dim() != 2 or weight.shape[1] % 32) else kind


def as_bytes(weight, kind):
    return gguf.quants.quantize(weight.numpy(), kind) if weight.is_floating_point() else weight.numpy()


def write(path, weights, kind=F32):
    writer = gguf.GGUFWriter(path, "tiny")
    for key, weight in weights.items():
        one = kind_of(weight, kind) if weight.is_floating_point() else gguf.GGMLQuantizationType.I8
        writer.add_tensor(key, as_bytes(weight, one), raw_dtype=one)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def as_held(weight, kind):
    """A weight's numbers in the file, by the package's own reading; diffusers makes float16 of eight bits."""
    one = kind_of(weight, kind)
    read = torch.from_numpy(gguf.quants.dequantize(as_bytes(weight, one), one)).float()
    return read.half().float() if one is Q8_0 else read


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Of whole models; a GGUF reads no weights of the transformer's folder."""
    place = tmp_path_factory.mktemp("gguf")
    for name in ("flux", "sd3", "pixart"):
        getattr(tiny_families, name)().save_pretrained(place / name)
    return place


@pytest.fixture
def without(folders, tmp_path):
    """The folder of a model without its transformer's weights."""

    def made(name):
        for path in (folders / name).rglob("*"):
            if path.is_file() and path.parts[-2:] != ("transformer", "diffusion_pytorch_model.safetensors"):
                to = tmp_path / name / path.relative_to(folders / name)
                to.parent.mkdir(parents=True, exist_ok=True)
                to.write_bytes(path.read_bytes())
        return tmp_path / name

    return made


@pytest.fixture
def flux(without, folders, tmp_path):
    """A file, its configs, and a model that has its numbers."""
    model = mem.load(folders / "flux", **OPTIONS)
    path = write(tmp_path / "flux.gguf", model.pipe.denoiser.state_dict(), Q8_0)
    return path, without("flux"), rounded(model, Q8_0)


def rounded(model, kind):
    model.pipe.denoiser.load_state_dict({key: as_held(one, kind) for key, one in weights_of(model).items()})
    return model


def weights_of(model):
    return {key: one.clone() for key, one in model.pipe.denoiser.state_dict().items()}


def scores(model, *names, prompts=PROMPTS):
    frame = mem.score(model, prompts, detectors=names or ["noise_norm", "anisotropy"], steps=8)
    return [value for name in names or ["noise_norm", "anisotropy"] for row in frame[name] for value in row]


@pytest.mark.parametrize("family, kind, near", [
    ("sd3", F32, 0), ("sd3", F16, 2e-3), ("sd3", BF16, 2e-2), ("sd3", Q8_0, 2e-2), ("flux", Q8_0, 2e-2),
])  # fmt: skip
def test_scores_are_those_of_the_files_numbers(folders, without, tmp_path, family, kind, near):
    """As exactly as they are, and near those of the model before it was quantized."""
    model = mem.load(folders / family, **OPTIONS)
    before, weights = scores(model), weights_of(model)
    path = write(tmp_path / "model.gguf", as_published(weights) if family == "sd3" else weights, kind)
    found = scores(mem.load(path, config=without(family), **OPTIONS))
    assert found == pytest.approx(scores(rounded(model, kind)), rel=1e-5)
    assert found == pytest.approx(before, rel=near)
    assert (found == before) == (kind is F32)


def test_gradients_generations_and_adapters(folders, without, tmp_path):
    """With an adapter on a layer that is quantized."""
    model, name = mem.load(folders / "sd3", **OPTIONS), "transformer_blocks.0.ff.net.2"
    path = write(tmp_path / "sd3.gguf", as_published(weights_of(model)), Q8_0)
    torch.manual_seed(1)
    down, up = torch.randn(2, 64), torch.randn(16, 2)
    save_file({f"transformer.{name}.lora_A.weight": down, f"transformer.{name}.lora_B.weight": up},
              tmp_path / "lora.safetensors")  # fmt: skip
    worn = mem.load(path, config=without("sd3"), adapters=[(tmp_path / "lora.safetensors", 0.5)], **OPTIONS)
    assert worn.pipe.denoiser.get_submodule(name).weight.dtype == torch.uint8
    methods = ("second_look", "trajectory_norm")
    bare = scores(rounded(model, Q8_0), *methods, prompts=PROMPTS[:1])
    model.pipe.denoiser.get_submodule(name).weight.data += 0.5 * up @ down
    by_hand, found = (scores(one, *methods, prompts=PROMPTS[:1]) for one in (model, worn))
    assert found == pytest.approx(by_hand, rel=1e-3) and found != pytest.approx(bare, rel=1e-2)


def test_weights_stay_small_and_are_computed_with_in_the_dtype(flux):
    path, configs, model = flux
    half = mem.load(path, config=configs, device="cpu", dtype="bfloat16")
    layer = half.pipe.denoiser.proj_out
    assert layer.weight.dtype == torch.uint8 and layer.compute_dtype == layer.bias.dtype == torch.bfloat16
    assert half.pipe.pipe.text_encoder.dtype == torch.bfloat16
    assert scores(half) == pytest.approx(scores(model), rel=0.2)


def test_the_command_and_its_revision(flux, tmp_path, monkeypatch, capsys):
    path, configs, _ = flux
    (tmp_path / "p.txt").write_text("\n".join(PROMPTS))
    common = ["detect", "--model", str(path), "--dtype", "float32", "--prompts", str(tmp_path / "p.txt")]
    detect_command([*common[1:], "--config", str(configs), "--out", str(tmp_path / "run")])
    revision = json.loads((tmp_path / "run" / "run.json").read_text())["settings"]["revision"]
    assert revision["file"] == sha256_of(path) and {"transformer", "text_encoder_2", "settings"} < set(revision)
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        run_script(lambda: detect_command([*common[1:], "--out", str(tmp_path / "none")]))
    assert ended.value.code == 2
    assert re.fullmatch(r"error: .*flux.gguf: is a transformer alone; .*: --config FOLDER\n", capsys.readouterr().err)


@pytest.mark.parametrize("change, said", [
    (lambda path, _: path.write_bytes(b""), "no whole file in GGUF"),
    (lambda path, _: path.write_bytes(b"not a checkpoint"), "no whole file in GGUF"),
    (lambda path, _: path.write_bytes(path.read_bytes()[:100]), "no whole file in GGUF"),
    (lambda path, _: path.write_bytes(path.read_bytes()[:-64]), "no whole file in GGUF"),
    (lambda path, its: write(path, {"token_embd.weight": torch.zeros(4, 32), "blk.0.attn_q.weight": torch.ones(4)}),
     r"its weights \(token_embd.weight, ...\) are no FluxTransformer2DModel's by name"),
    (lambda path, its: write(path, {**its, "proj_out.bias": torch.zeros(64).char()}),
     "its proj_out.bias is in I8, which diffusers does not read"),
    (lambda path, its: write(path, {key: one for key, one in its.items() if key != "proj_out.bias"}),
     "lacks the weight proj_out.bias"),
    (lambda path, its: write(path, {**its, "more.weight": torch.zeros(4)}), "weight more.weight, for which the con"),
    (lambda path, its: write(path, {**its, "proj_out.bias": torch.zeros(8)}), "is no Flux.*proj_out.bias"),
])  # fmt: skip
def test_what_is_no_transformer_of_the_config_is_one_line(flux, change, said):
    path, configs, model = flux
    change(path, weights_of(model))
    with pytest.raises(InputError, match=f"flux.gguf: .*{said}"):
        mem.load(path, config=configs, **OPTIONS)


def test_a_config_of_fewer_layers_is_refused(folders, without, tmp_path):
    """Under the names as published: diffusers would leave the rest out without a word."""
    weights = tiny_families.sd3().transformer.state_dict()
    path, configs = write(tmp_path / "sd3.gguf", as_published(weights)), without("sd3")
    config = configs / "transformer" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "num_layers": 1}))
    with pytest.raises(InputError, match=r"sd3.gguf: holds the weight transformer_blocks.*for which the config has no"):
        mem.load(path, config=configs, **OPTIONS)


def test_a_familys_and_a_configs_errors(flux, folders):
    path, configs, _ = flux
    for config, name in ((folders / "pixart", "PixArtSigma"), (GOLDEN / "tiny-eps", "StableDiffusion")):
        with pytest.raises(InputError, match=rf"flux.gguf: of a {name}Pipeline no GGUF is read"):
            mem.load(path, config=config, **OPTIONS)
    with pytest.raises(InputError, match=r"flux.gguf: its weights \(.*\) are no SD3Transformer2DModel's by name"):
        mem.load(path, config=folders / "sd3", **OPTIONS)
    config = configs / "transformer" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "auto_map": {"AutoModel": "mine.Evil"}}))
    with pytest.raises(InputError, match=r"config.json: auto_map names code"):
        mem.load(path, config=configs, **OPTIONS)


def test_without_the_package(flux, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(InputError, match=r"flux.gguf: needs the package gguf: pip install gguf"):
        mem.load(flux[0], config=flux[1], **OPTIONS)


def test_of_a_hub_id_the_transformers_weights_are_not_fetched(flux, monkeypatch):
    asked = {}
    monkeypatch.setattr(ours.DiffusionPipeline, "download", lambda name, **options: asked.update({name: options}))
    monkeypatch.setattr(ours, "snapshot_download", lambda name, **options: asked.update(options) or "/x")
    assert str(ours.parts_for(flux[0], "someone/flux")) == "/x"
    assert asked["someone/flux"]["transformer"] is None and asked["allow_patterns"] == ["transformer/config.json"]
