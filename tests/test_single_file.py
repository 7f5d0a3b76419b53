"""Models that are one file, and adapters on top of a model."""

import json
import pickle
import re

import pytest
import tiny_families
import torch
import yaml
from audited import layers
from conftest import GOLDEN, load_tiny
from diffusers import FluxTransformer2DModel
from safetensors.torch import load_file, save_file

import memorization as mem
from memorization.cli.detect import main as detect_command
from memorization.errors import InputError
from memorization.flags import adapter
from memorization.io.files import sha256_of
from memorization.models.loading import load_model, revision_of
from memorization.models.single import without_place

TINY = GOLDEN / "tiny-eps"
PROMPTS = ["a red kite", "two boats"]


RESNET = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
          "conv2": "out_layers.3", "conv_shortcut": "skip_connection"}  # fmt: skip
ENDS = {"conv_in": "input_blocks.0.0", "time_embedding.linear_1": "time_embed.0", "conv_norm_out": "out.0",
        "time_embedding.linear_2": "time_embed.2", "conv_out": "out.2"}  # fmt: skip
ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def as_of_old(key, layers, attends):
    """The name of a UNet's weight in the checkpoints that Stable Diffusion was published in.

    Args:
        layers: resnets to a block, on the way down.
        attends: whether each block on the way up has attention.
    """
    for new, old in ENDS.items():
        if key.startswith(new):
            return key.replace(new, old)
    if match := re.match(r"(down|up)_blocks\.(\d+)\.(resnets|attentions)\.(\d+)\.(.*)", key):
        way, block, kind, number, rest = match[1], int(match[2]), match[3], int(match[4]), match[5]
        place = block * (layers + 1) + number + (way == "down")
        stem = f"{'input' if way == 'down' else 'output'}_blocks.{place}.{int(kind == 'attentions')}"
    elif match := re.match(r"down_blocks\.(\d+)\.downsamplers\.0\.conv\.(.*)", key):
        return f"input_blocks.{(int(match[1]) + 1) * (layers + 1)}.0.op.{match[2]}"
    elif match := re.match(r"up_blocks\.(\d+)\.upsamplers\.0\.(.*)", key):
        block = int(match[1])
        return f"output_blocks.{block * (layers + 1) + layers}.{1 + attends[block]}.{match[2]}"
    else:
        match = re.match(r"mid_block\.(resnets|attentions)\.(\d+)\.(.*)", key)
        kind, rest = match[1], match[3]
        stem = f"middle_block.{1 if kind == 'attentions' else 2 * int(match[2])}"
    first = rest.split(".")[0]
    return f"{stem}.{rest.replace(first, RESNET[first], 1) if kind == 'resnets' else rest}"


def picture_part(key, blocks):
    """The same of an autoencoder's weight."""
    key = re.sub(r"down_blocks\.(\d+)\.resnets", r"down.\1.block", key)
    key = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", key)
    key = re.sub(r"up_blocks\.(\d+)\.resnets", lambda m: f"up.{blocks - 1 - int(m[1])}.block", key)
    key = re.sub(r"up_blocks\.(\d+)\.upsamplers\.0", lambda m: f"up.{blocks - 1 - int(m[1])}.upsample", key)
    key = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", key)
    if "mid_block.attentions.0" in key:
        key = key.replace("mid_block.attentions.0", "mid.attn_1")
        for new, old in ATTENTION.items():
            key = key.replace(f"attn_1.{new}.", f"attn_1.{old}.")
    return key.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")


def in_one(folder):
    """The weights of a checkpoint under the names that one file has them by."""
    unet, vae, text = (
        load_file(folder / part / f"{stem}.safetensors")
        for part, stem in (("unet", "diffusion_pytorch_model"), ("vae", "diffusion_pytorch_model"),
                           ("text_encoder", "model"))
    )  # fmt: skip
    config = json.loads((folder / "unet" / "config.json").read_text())
    blocks = len(json.loads((folder / "vae" / "config.json").read_text())["block_out_channels"])
    attends = ["CrossAttn" in name for name in config["up_block_types"]]
    prefix = "cond_stage_model.transformer."
    prefix += "" if any(key.startswith("text_model.") for key in text) else "text_model."
    named = {prefix + key: value for key, value in text.items()}
    for key, value in unet.items():
        named["model.diffusion_model." + as_of_old(key, config["layers_per_block"], attends)] = value
    for key, value in vae.items():
        wide = "attentions" in key and "group_norm" not in key and key.endswith("weight")
        named["first_stage_model." + picture_part(key, blocks)] = value[..., None, None] if wide else value
    return named


@pytest.fixture
def file(tmp_path):
    save_file(in_one(TINY), tmp_path / "whole.safetensors")
    return tmp_path / "whole.safetensors"


@pytest.fixture
def configs(tmp_path):
    """The folder without its weights."""
    for path in TINY.rglob("*"):
        if path.is_file() and path.suffix != ".safetensors":
            to = tmp_path / "configs" / path.relative_to(TINY)
            to.parent.mkdir(parents=True, exist_ok=True)
            to.write_bytes(path.read_bytes())
    return tmp_path / "configs"


def scores(model):
    return mem.score(model, PROMPTS, detectors=["anisotropy", "noise_norm"])["anisotropy"].tolist()


def test_one_file_is_the_model_of_its_folder(file, configs):
    model = mem.load(file, config=configs, device="cpu", dtype="float32")
    assert scores(model) == scores(mem.load(TINY, device="cpu", dtype="float32"))
    revision = revision_of(model.pipe, pictures=True)
    assert revision["file"] == sha256_of(file) and {"unet", "tokenizer", "vae"} < set(revision)


@pytest.mark.parametrize("key", [
    "model.diffusion_model.input_blocks.0.0.weight", "first_stage_model.decoder.conv_in.bias",
    "cond_stage_model.transformer.text_model.final_layer_norm.weight",
])  # fmt: skip
def test_a_file_that_lacks_a_weight_is_refused(file, configs, key):
    save_file({name: one for name, one in load_file(file).items() if name != key}, file)
    with pytest.raises(InputError, match=r"whole.safetensors: (lacks the weight|is no StableDiffusionPipeline)"):
        mem.load(file, config=configs, device="cpu", dtype="float32")


BESIDE = (  # of published files: averages, schedules, losses, marks, and more of CLIP than is used
    "model_ema.decay", "model_ema.diffusion_modeltime_embed0weight", "betas", "alphas_cumprod", "v_pred",
    "denoiser.sigmas", "first_stage_model.loss.logvar", "first_stage_model.loss.discriminator.main.0.weight",
    "cond_stage_model.logit_scale", "cond_stage_model.transformer.text_model.embeddings.position_ids",
    "cond_stage_model.transformer.text_model.encoder.layers.9.layer_norm1.weight",
)  # fmt: skip


def test_what_lies_beside_the_networks_is_left_alone(file, configs):
    expected = scores(mem.load(TINY, device="cpu", dtype="float32"))
    save_file({**load_file(file), **{key: torch.ones(2) for key in BESIDE}}, file)
    assert scores(mem.load(file, config=configs, device="cpu", dtype="float32")) == expected


@pytest.mark.parametrize("key, said", [
    ("model.diffusion_model.output_blocks.{}.0.in_layers.0.weight",
     r"weight up_blocks.*norm1.weight, for which the config of the unet has no place"),
    ("first_stage_model.encoder.down.0.block.9.norm1.weight",
     r"weight encoder.down_blocks.0.resnets.9.norm1.weight, for which the config of the vae has no place"),
    ("model.diffusion_model.out.2.scale_weight", r"model.diffusion_model.out.2.scale_weight: quantized weights are"),
])  # fmt: skip
def test_a_weight_without_a_place_is_refused(file, configs, key, said):
    held = load_file(file)
    blocks = {match[1] for name in held if (match := re.match(r".*\.output_blocks\.(\d+)\.", name))}
    save_file({**held, key.format(len(blocks)): torch.ones(8)}, file)
    with pytest.raises(InputError, match=f"whole.safetensors: holds (the )?{said}"):
        mem.load(file, config=configs, device="cpu", dtype="float32")


def flux_names(guided):
    """The weights of Flux.1 as published, of one block of each kind, without numbers; sizes as far as they matter."""
    parts = {
        "double_blocks.0": ["img_mod.lin", "img_attn.qkv", "img_attn.proj", "img_mlp.0", "img_mlp.2",
                            "txt_mod.lin", "txt_attn.qkv", "txt_attn.proj", "txt_mlp.0", "txt_mlp.2"],
        "single_blocks.0": ["linear1", "linear2", "modulation.lin"],
        "final_layer": ["linear", "adaLN_modulation.1"],
        "time_in": ["in_layer", "out_layer"], "vector_in": ["in_layer", "out_layer"],
        **({"guidance_in": ["in_layer", "out_layer"]} if guided else {}),
    }  # fmt: skip
    layers = ["img_in", "txt_in", *(f"{part}.{layer}" for part, own in parts.items() for layer in own)]
    norms = [f"double_blocks.0.{one}_attn.norm" for one in ("img", "txt")] + ["single_blocks.0.norm"]
    names = [f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")]
    names += [f"{norm}.{one}_norm.scale" for norm in norms for one in ("query", "key")]
    return {name: torch.empty(7 * 3072 if ".linear1." in name else 12, device="meta") for name in names}


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_dev_in_the_place_of_schnell_is_seen(prefix):
    with torch.device("meta"):
        schnell, dev = (FluxTransformer2DModel(num_layers=1, num_single_layers=1, guidance_embeds=guided)
                        for guided in (False, True))  # fmt: skip
    held = {guided: {prefix + name: one for name, one in flux_names(guided).items()} for guided in (False, True)}
    assert without_place(schnell, held[False]) == without_place(dev, held[True]) == []
    assert without_place(schnell, held[True])[0] == "time_text_embed.guidance_embedder.linear_1.bias"


def test_a_file_that_is_a_transformer_alone(tmp_path):
    """As Flux and Stable Diffusion 3 are published too; all else is the folder's."""
    as_published = pytest.importorskip("test_gguf").as_published
    pipe = tiny_families.sd3()
    pipe.save_pretrained(tmp_path / "sd3")
    save_file({key: one.contiguous() for key, one in as_published(pipe.transformer.state_dict()).items()},
              tmp_path / "alone.safetensors")  # fmt: skip
    options = {"device": "cpu", "dtype": "float32"}
    model = mem.load(tmp_path / "alone.safetensors", config=tmp_path / "sd3", **options)
    assert scores(model) == scores(mem.load(tmp_path / "sd3", **options))


def test_without_configs_the_flag_is_named(file, monkeypatch):
    with pytest.raises(InputError, match=r"whole.safetensors: looks like .*: --config "):
        mem.load(file, device="cpu", dtype="float32")
    with pytest.raises(InputError, match=r"--config .*: goes with a model that is one file"):
        mem.load(TINY, config=TINY, device="cpu")


@pytest.mark.parametrize("suffix", [".ckpt", ".bin", ".pt", ".pth"])
def test_pickles_are_refused_unopened(tmp_path, suffix, configs):
    path = tmp_path / f"model{suffix}"
    path.write_bytes(pickle.dumps({"state_dict": {}}))
    with pytest.raises(InputError, match=rf"model{suffix}: may be a pickle"):
        mem.load(path, config=configs, device="cpu")


def test_configs_with_a_pickle_are_refused(file, configs):
    (configs / "vae" / "diffusion_pytorch_model.bin").write_bytes(b"")
    with pytest.raises(InputError, match=r"diffusion_pytorch_model.bin: may be a pickle"):
        mem.load(file, config=configs, device="cpu")


@pytest.mark.parametrize("config", ["scheduler/scheduler_config.json", "tokenizer/tokenizer_config.json"])
def test_parts_of_the_folder_are_examined_as_ever(file, configs, config):
    content = json.loads((configs / config).read_text())
    (configs / config).write_text(json.dumps({**content, "auto_map": {"AutoTokenizer": "mine.Evil"}}))
    with pytest.raises(InputError, match=rf"{config}: auto_map names code"):
        mem.load(file, config=configs, device="cpu", dtype="float32")


def test_an_encoder_that_the_file_lacks_is_the_folders_and_whole(file, configs):
    held = load_file(file)
    save_file({name: one for name, one in held.items() if not name.startswith("cond_stage_model")}, file)
    weights = load_file(TINY / "text_encoder" / "model.safetensors")
    save_file(weights, configs / "text_encoder" / "model.safetensors", {"format": "pt"})
    model = mem.load(file, config=configs, device="cpu", dtype="float32")
    assert scores(model) == scores(mem.load(TINY, device="cpu", dtype="float32"))
    lacking = min(key for key in weights if "final_layer_norm" in key)
    del weights[lacking]
    save_file(weights, configs / "text_encoder" / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"text_encoder: lacks the weight .*final_layer_norm"):
        mem.load(file, config=configs, device="cpu", dtype="float32")


def test_what_diffusers_has_not_of_a_family_is_one_line(file, loras, tmp_path):
    """PixArt has neither."""
    tiny_families.pixart().save_pretrained(tmp_path / "pixart")
    options = {"device": "cpu", "dtype": "float32"}
    with pytest.raises(InputError, match=r"whole.safetensors: diffusers reads no PixArtSigmaPipeline from one file"):
        mem.load(file, config=tmp_path / "pixart", **options)
    with pytest.raises(InputError, match=r"PixArtSigmaPipeline: takes no LoRA"):
        mem.load(tmp_path / "pixart", adapters=[(loras[0], 1.0)], **options)


@pytest.mark.parametrize("content", [b"", b"\x00" * 40, b"not a checkpoint"])
def test_a_file_that_is_none_is_refused(tmp_path, content, configs):
    (tmp_path / "broken.safetensors").write_bytes(content)
    with pytest.raises(InputError, match=r"broken.safetensors: "):
        mem.load(tmp_path / "broken.safetensors", config=configs, device="cpu")
    with pytest.raises(InputError, match=r"missing.safetensors: no such file"):
        mem.load(tmp_path / "missing.safetensors", config=configs, device="cpu")


# ---------------------------------------------------------------- adapters
@pytest.fixture
def loras(tmp_path):
    pipe = load_tiny("tiny-eps")
    save_file(layers(pipe, 1.0), tmp_path / "one.safetensors")
    save_file({key: value.flip(0) for key, value in layers(pipe, 0.5).items()}, tmp_path / "two.safetensors")
    return [tmp_path / "one.safetensors", tmp_path / "two.safetensors"]


def with_layers(pipe, files):
    """The weights with adapters added by hand."""
    for path, scale in files:
        tensors = load_file(path)
        for key in [key for key in tensors if key.endswith("lora_A.weight")]:
            module = pipe.unet.get_submodule(key.removeprefix("unet.").removesuffix(".lora_A.weight"))
            module.weight.data += scale * tensors[key.replace("lora_A", "lora_B")] @ tensors[key]
    return pipe


def test_adapters_add_up_at_their_scales(loras):
    worn = [(loras[0], 0.7), (loras[1], -1.5)]
    model = mem.load(TINY, device="cpu", dtype="float32", adapters=worn)
    expected = with_layers(load_tiny("tiny-eps"), worn)
    with torch.no_grad():
        found, by_hand, bare = (
            pipe.predict_noise(pipe.pure_noise(1, 0), 981, pipe.embed(["kite"]))
            for pipe in (model.pipe, expected, load_tiny("tiny-eps"))
        )
    assert torch.allclose(found, by_hand, atol=1e-4) and not torch.allclose(found, bare, atol=1e-2)
    revision = revision_of(model.pipe, pictures=False)
    assert revision["lora 1 at 0.7"] == sha256_of(loras[0]) and revision["lora 2 at -1.5"] == sha256_of(loras[1])


def test_the_command_takes_a_file_and_adapters(file, configs, loras, tmp_path, capsys):
    (tmp_path / "p.txt").write_text("\n".join(PROMPTS))
    common = [
        "--model",
        str(file),
        "--config",
        str(configs),
        "--prompts",
        str(tmp_path / "p.txt"),
        "--dtype",
        "float32",
    ]
    detect_command([*common, "--out", str(tmp_path / "bare")])
    detect_command([*common, "--lora", f"{loras[0]}:0.5", "--lora", str(loras[1]), "--out", str(tmp_path / "worn")])
    rows = [(tmp_path / run / "scores.jsonl").read_text() for run in ("bare", "worn")]
    assert rows[0] != rows[1]
    revision = json.loads((tmp_path / "worn" / "run.json").read_text())["settings"]["revision"]
    assert {"file", "lora 1 at 0.5", "lora 2 at 1"} < set(revision)
    with pytest.raises(InputError, match="revision"):
        detect_command([*common, "--lora", f"{loras[0]}:0.6", "--lora", str(loras[1]), "--out", str(tmp_path / "worn")])


def test_a_calibration_holds_for_the_adapters_that_it_was_made_with(loras, tmp_path):
    options = {"device": "cpu", "dtype": "float32"}
    bare = mem.load(TINY, **options)
    worn, weaker = (mem.load(TINY, adapters=[(loras[0], scale)], **options) for scale in (0.5, 0.25))
    levels = dict.fromkeys((0.25, 0.5, 0.75, 0.9, 0.99), 1.0)
    content = {"model": str(TINY), "num_images": 1, "steps": 50,
               "detectors": {"noise_norm": {"threshold": 1.0, "levels": levels}}}  # fmt: skip
    revision = {"revision": revision_of(worn.pipe, pictures=False)}
    for name, more in (("of-old", {}), ("worn", revision)):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump({**content, **more}))

    def scored(model, calibration):
        return mem.score(model, PROMPTS[:1], detectors=["noise_norm"], calibration=tmp_path / f"{calibration}.yaml")

    assert len(scored(bare, "of-old")) == len(scored(worn, "worn")) == 1
    for model, calibration, said in (
        (bare, "worn", "was made with lora 1 at 0.5"), (worn, "of-old", "was made without lora 1 at 0.5"),
        (weaker, "worn", "was made without lora 1 at 0.25"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=said):
            scored(model, calibration)
    with pytest.raises(InputError, match=r"was made without lora 1 at 0.5"):
        mem.mitigate(worn, PROMPTS, "noise_norm", calibration=tmp_path / "of-old.yaml", noises=1)


def test_a_scale_is_told_from_a_path():
    for text, name, scale in (
        ("a.safetensors", "a.safetensors", 1), ("a.safetensors:0.5", "a.safetensors", 0.5),
        ("C:/a.safetensors", "C:/a.safetensors", 1), ("a:b.safetensors:-2", "a:b.safetensors", -2),
    ):  # fmt: skip
        path, found = adapter(text)
        assert (str(path), found) == (name, scale)


def test_adapters_of_other_families(tmp_path):
    """A layer of a transformer, whose names another family has."""
    tiny_families.sd3().save_pretrained(tmp_path / "sd3")
    name = "transformer.transformer_blocks.0.attn.to_q"
    torch.manual_seed(1)
    save_file({f"{name}.lora_A.weight": torch.randn(2, 16), f"{name}.lora_B.weight": torch.randn(16, 2)},
              tmp_path / "sd3.safetensors")  # fmt: skip
    options = {"device": "cpu", "dtype": "float32"}
    bare = mem.load(tmp_path / "sd3", **options)
    worn = mem.load(tmp_path / "sd3", adapters=[(tmp_path / "sd3.safetensors", 1.0)], **options)
    assert scores(bare) != scores(worn)
    assert "lora 1 at 1" in revision_of(worn.pipe, pictures=False)
    with pytest.raises(InputError, match=r"sd3.safetensors: is no adapter of this base|have no place in this base"):
        mem.load(TINY, adapters=[(tmp_path / "sd3.safetensors", 1.0)], **options)


def test_a_command_for_stable_diffusion_takes_a_file_too(file, configs):
    model = load_model(str(file), device="cpu", dtype="float32", config=str(configs))
    assert type(model.pipe).__name__ == "LocalStableDiffusionPipeline"
