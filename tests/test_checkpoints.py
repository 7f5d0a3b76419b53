"""Damaged and hostile checkpoints: one line each that names the file, no pickle opened, no code run, no network.

Each case is a whole checkpoint and one thing that is wrong with it. ``torch.load``, sockets and threads fail the test.
"""

import json
import os
import re
import shutil
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from conftest import GOLDEN
from diffusers.schedulers import KarrasDiffusionSchedulers
from PIL import Image
from safetensors.torch import load_file, save_file

import detect_mem
import mitigate_mem
from memorization.errors import InputError
from memorization.index.build import build_index
from memorization.index.store import Index
from memorization.mitigations.case import Remedy
from memorization.models.decoding import encode
from memorization.models.generation import detection_grid
from memorization.models.loading import load_autoencoder, load_pipeline, load_scheduler
from memorization.models.pixel_diffusion import load_pixel_model, sample_pixels
from memorization.models.spec import ModelSpec
from memorization.runs.cases import Cases
from memorization.runs.sampling import sample
from memorization.similarity.clip import Clip
from memorization.similarity.judge import Judge, TrainingPictures

SHIPPED = GOLDEN.parent.parent / "testbed" / "models"
Damage = Callable[[Path], None]


def load_stable_diffusion(folder: str):
    return load_pipeline(ModelSpec("damaged", (folder,)), "float32", torch.device("cpu"), pictures=True)


class Kind(NamedTuple):
    """A kind of checkpoint: a whole one of it, and what loads it."""

    whole: Path
    load: Callable[[str], object]


KINDS = {
    "pipeline": Kind(GOLDEN / "tiny-eps", load_stable_diffusion),
    "autoencoder": Kind(GOLDEN / "tiny-eps", load_autoencoder),
    "pixel": Kind(SHIPPED / "pixel-uncond", load_pixel_model),
    "clip": Kind(SHIPPED / "clip", Clip),
}


class Case(NamedTuple):
    """What is done to a whole checkpoint, and what is said of it."""

    kind: str
    name: str
    damage: Damage
    said: str


def write(path: Path, content: bytes) -> None:
    """The copies are links to the whole checkpoint: a new file takes the link's place."""
    path.unlink(missing_ok=True)
    path.write_bytes(content)


def written(file: str, content: bytes) -> Damage:
    return lambda folder: write(folder / file, content)


def dumped(file: str, value) -> Damage:
    return written(file, json.dumps(value).encode())


def without(file: str) -> Damage:
    return lambda folder: (folder / file).unlink()


def edited(file: str, without: str = "", **changes) -> Damage:
    """A JSON file with other values, and ``without`` a key."""

    def damage(folder: Path) -> None:
        values = {**json.loads((folder / file).read_bytes()), **changes}
        values.pop(without, None)
        dumped(file, values)(folder)

    return damage


def both(*damages: Damage) -> Damage:
    def damage(folder: Path) -> None:
        for one in damages:
            one(folder)

    return damage


def weights(file: str, change: Callable[[dict], dict]) -> Damage:
    """Other weights, by those of the whole checkpoint."""

    def damage(folder: Path) -> None:
        changed = change(load_file(folder / file))
        (folder / file).unlink()
        save_file(changed, folder / file, {"format": "pt"})

    return damage


def truncated(file: str, share: float) -> Damage:
    def damage(folder: Path) -> None:
        content = (folder / file).read_bytes()
        write(folder / file, content[: int(len(content) * share)])

    return damage


class Canary:
    """Unpickled, it leaves a mark."""

    def __reduce__(self):
        return os.mkdir, (os.environ["CANARY"],)


def pickled(file: str, instead_of: str = "") -> Damage:
    def damage(folder: Path) -> None:
        (folder / (instead_of or file)).unlink(missing_ok=True)
        torch.save({"weight": Canary()}, folder / file)

    return damage


def sharded(file: str, shard: str, kept: slice = slice(None), *, present: bool = True) -> Damage:
    """One shard with an index that names it ``shard``; the single file is gone."""

    def damage(folder: Path) -> None:
        whole = load_file(folder / file)
        names = list(whole)[kept]
        (folder / file).unlink()
        place = (folder / file).parent / shard
        if present and shard.endswith(".safetensors"):
            save_file({name: whole[name] for name in names}, place, {"format": "pt"})
        elif present:
            torch.save({"weight": Canary()}, place)
        index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(names, shard)}
        dumped(f"{file}.index.json", index)(folder)

    return damage


def a_folder(file: str) -> Damage:
    return lambda folder: [(folder / file).unlink(), (folder / file).mkdir()][1]


def emptied(folder: Path) -> None:
    for path in folder.glob("*/"):
        shutil.rmtree(path)


def weight_cases(kind: str, part: str, file: str, key: str) -> list[Case]:
    """Everything that may be wrong with the weights of a part; ``key`` is one of them."""
    name, bare = f"{part}{file}", re.escape(file.removesuffix(".safetensors"))
    index = f"{name}.index.json"
    where = part.rstrip("/") or "clip"
    loaded = re.escape(key.removeprefix("text_model."))  # as transformers calls it
    damages = {
        "no weights": (without(name), f"no {bare}.safetensors"),
        "empty": (written(name, b""), f"{bare}.safetensors: .*cannot be read"),
        "a torn header": (written(name, b"\xff\x00\x00\x00\x00\x00\x00\x00{"), f"{bare}.safetensors: .*cannot be read"),
        "half a file": (truncated(name, 0.5), f"{bare}.safetensors: .*cannot be read"),
        "one byte short": (truncated(name, 0.99999), f"{bare}.safetensors: .*cannot be read"),
        "noise": (written(name, os.urandom(512)), f"{bare}.safetensors: .*cannot be read"),
        "a folder": (a_folder(name), f"{bare}.safetensors: .*cannot be read"),
        "a pickle by the name": (pickled(name), f"{bare}.safetensors: .*cannot be read"),
        "a pickle alone": (pickled(f"{part}pytorch_model.bin", name), f"no {bare}.safetensors"),
        "diffusers' pickle alone": (pickled(f"{part}diffusion_pytorch_model.bin", name), f"no {bare}.safetensors"),
        "a key missing": (weights(name, lambda w: {k: v for k, v in w.items() if k != key}),
                          f"{where}: lacks the weight {loaded}"),
        "nothing": (weights(name, lambda w: {}), f"{where}: lacks the weight"),
        "half the keys": (weights(name, lambda w: dict(list(w.items())[::2])), f"{where}: lacks the weight"),
        "another prefix": (weights(name, lambda w: {f"student.{k}": v for k, v in w.items()}), f"{where}: lacks"),
        "another key": (weights(name, lambda w: {**w, "adapter.up": torch.ones(2)}),
                        f"{where}: holds the weight adapter.up"),
        "another shape": (weights(name, lambda w: {**w, key: torch.cat([w[key], w[key]])}),
                          f"{where}: .*{loaded} has another shape"),
        "shards of pickle": (sharded(name, "pytorch_model-1.bin"), "pytorch_model-1.bin.*only safetensors"),
        "shards of pickle, not there": (sharded(name, "model-1.bin", present=False), "model-1.bin.*only safetensors"),
        "shards outside": (sharded(name, "../outside.safetensors"), "outside.safetensors.*not in its folder"),
        "shards elsewhere": (sharded(name, "/etc/x.safetensors", present=False), "x.safetensors.*not in its folder"),
        "shards on Windows": (sharded(name, "..\\x.safetensors", present=False), "x.safetensors.*not in its folder"),
        "no such shard": (sharded(name, "model-1.safetensors", present=False), "model-1.safetensors: .*cannot be read"),
        "half the shards": (sharded(name, "model-1.safetensors", slice(None, None, 2)), f"{where}: lacks the weight"),
        "an index beside it": (dumped(index, {"weight_map": {key: "model.bin"}}), "model.bin.*only safetensors"),
        "an index of nothing": (both(without(name), dumped(index, {"weight_map": {}})), "index.json: names no weights"),
        "an index without a map": (both(without(name), dumped(index, {})), "index.json: names no weights"),
        "an index of numbers": (both(without(name), dumped(index, {"weight_map": {key: 3}})), "only safetensors"),
        "an index that is a list": (both(without(name), dumped(index, [key])), "index.json: (damaged|holds no table)"),
        "an index that is torn": (both(without(name), written(index, b'{"weight_map')),
                                  "index.json: (damaged|cannot be read)"),
    }  # fmt: skip
    return [Case(kind, f"{part}{what}", damage, said) for what, (damage, said) in damages.items()]


def config_cases(kind: str, file: str) -> list[Case]:
    """Everything that may be wrong with any config."""
    unread = "(cannot be read|damaged|holds no table)"
    code, bare = "no code of a checkpoint is run", re.escape(Path(file).name)
    damages = {
        "missing": (without(file), f"{bare}"),
        "empty": (written(file, b""), f"{bare}: {unread}"),
        "torn": (truncated(file, 0.5), f"{bare}: {unread}"),
        "a list": (dumped(file, []), f"{bare}: {unread}"),
        "a number": (dumped(file, 3), f"{bare}: {unread}"),
        "null": (dumped(file, None), f"{bare}: {unread}"),
        "of nothing": (dumped(file, {}), f"{bare}: "),
        "not UTF-8": (written(file, b'{"a": "\xff\xfe"}'), f"{bare}: {unread}"),
        "nested without end": (written(file, b'{"a":' + b"[" * 99999), f"{bare}: {unread}"),
        "a folder": (a_folder(file), f"{bare}"),
        "code of its own": (edited(file, auto_map={"AutoModel": "evil.Model"}), f"{bare}: auto_map.*{code}"),
        "code, nested": (edited(file, extra={"auto_map": {"AutoModel": "evil.Model"}}), f"{bare}: auto_map.*{code}"),
        "a pipeline of its own": (edited(file, custom_pipeline="evil"), f"{bare}: custom_pipeline.*{code}"),
    }
    return [Case(kind, f"{file} {what}", damage, said) for what, (damage, said) in damages.items()]


def model_cases(kind: str, file: str, typo: tuple[str, str], other: dict) -> list[Case]:
    """What may be wrong with the config of a network: a ``typo`` of a key, and the class of an ``other`` one."""
    right, wrong = typo
    damages = {
        "quantised": (edited(file, quantization_config={"quant_method": "bitsandbytes"}), "quantization_config"),
        "other weights": (edited(file, transformers_weights="adapter.bin"), "transformers_weights"),
        "other weights outside": (edited(file, transformers_weights="../x.safetensors"), "transformers_weights"),
        "a kernel of the hub": (edited(file, _attn_implementation="evil/kernel"), "attn_implementation.*evil/kernel"),
        "a kernel by its new name": (edited(file, attn_implementation="evil/kernel:f"), "attn_implementation.*evil"),
        "a kernel that is fetched": (edited(file, _attn_implementation="flash_attention_2"), "flash_attention_2"),
        "kernels by part": (edited(file, _attn_implementation={"": "evil/k"}), "attn_implementation.*evil/k"),
        "a kernel, nested": (edited(file, text_config={"_attn_implementation": "evil/k"}), "attn_implementation.*evil"),
        "a typo": (both(edited(file, **{wrong: 1}), edited(file, right)), f"{wrong}.*{right}"),
        "of another class": (edited(file, **other), "config.json: .*is no "),
        "an adapter beside it": (dumped(str(Path(file).with_name("adapter_config.json")), {"peft_type": "LORA"}),
                                 "adapter_config.json"),
    }  # fmt: skip
    return [Case(kind, f"{file} {what}", damage, said) for what, (damage, said) in damages.items()]


UNET, TEXT, VAE = "unet/config.json", "text_encoder/config.json", "vae/config.json"
SCHEDULER, TOKENIZER, INDEX = "scheduler/scheduler_config.json", "tokenizer/tokenizer_config.json", "model_index.json"
DIFFUSERS, TRANSFORMERS = "diffusion_pytorch_model.safetensors", "model.safetensors"
OTHER_FAMILIES = (
    "FlowMatchEulerDiscreteScheduler", "EDMEulerScheduler", "EDMDPMSolverMultistepScheduler", "KarrasVeScheduler",
    "ScoreSdeVeScheduler", "ScoreSdeVpScheduler", "CMStochasticIterativeScheduler", "IPNDMScheduler",
    "VQDiffusionScheduler", "AmusedScheduler", "CogVideoXDDIMScheduler",
)  # fmt: skip


def values(file: str, key: str, given: list, said: str, kind: str = "pipeline") -> list[Case]:
    """Values of one key that make no sense."""
    return [Case(kind, f"{file} {key} {value!r:.20}", edited(file, **{key: value}), said) for value in given]


WEIGHTS = [
    *weight_cases("pipeline", "unet/", DIFFUSERS, "conv_in.weight"),
    *weight_cases("pipeline", "text_encoder/", TRANSFORMERS, "text_model.final_layer_norm.weight"),
    *weight_cases("pipeline", "vae/", DIFFUSERS, "decoder.conv_in.weight"),
    *weight_cases("autoencoder", "vae/", DIFFUSERS, "encoder.conv_in.weight"),
    *weight_cases("pixel", "unet/", DIFFUSERS, "conv_in.weight"),
    *weight_cases("clip", "", TRANSFORMERS, "visual_projection.weight"),
]  # fmt: skip
CONFIGS = [
    *config_cases("pipeline", UNET), *config_cases("pipeline", TEXT), *config_cases("pipeline", VAE),
    *config_cases("pipeline", SCHEDULER), *config_cases("pipeline", TOKENIZER), *config_cases("pipeline", INDEX),
    *config_cases("autoencoder", VAE), *config_cases("pixel", UNET), *config_cases("pixel", SCHEDULER),
    *config_cases("clip", "config.json"), *config_cases("clip", "preprocessor_config.json"),
]  # fmt: skip
NETWORKS = [
    *model_cases("pipeline", UNET, ("cross_attention_dim", "cross_attention_dimm"), {"_class_name": "UNet2DModel"}),
    *model_cases("pipeline", TEXT, ("num_hidden_layers", "num_hiden_layers"), {"model_type": "bert"}),
    *model_cases("pipeline", VAE, ("scaling_factor", "scalling_factor"), {"_class_name": "AutoencoderTiny"}),
    *model_cases("autoencoder", VAE, ("latent_channels", "latent_chanels"), {"_class_name": "VQModel"}),
    *model_cases("pixel", UNET, ("block_out_channels", "block_out_chanels"), {"_class_name": "UNet1DModel"}),
    *model_cases("clip", "config.json", ("projection_dim", "projection_dimm"), {"model_type": "siglip"}),
]  # fmt: skip
TOGETHER = [
    Case("pipeline", "fewer layers than its config says", edited(TEXT, num_hidden_layers=3), "text_encoder: lacks"),
    Case("pipeline", "more layers than its config says", edited(TEXT, num_hidden_layers=1), "text_encoder: holds"),
    Case("pipeline", "a wider text encoder", edited(TEXT, hidden_size=32), "text_encoder: .*shape"),
    Case("pipeline", "an activation with a typo", edited(TEXT, hidden_act="quik_gelu"), "text_encoder: .*quik_gelu"),
    Case("pipeline", "a UNet of another width", edited(UNET, block_out_channels=[32, 32]), "unet: holds the weight"),
    Case("pipeline", "a block with a typo", edited(UNET, down_block_types=["DownBlok2D", "DownBlock2D"]), "DownBlok2D"),
    Case("pipeline", "a UNet that paints in holes",
         both(weights(f"unet/{DIFFUSERS}", lambda w: {**w, "conv_in.weight": w["conv_in.weight"].repeat(1, 2, 1, 1)}),
              edited(UNET, in_channels=8)), "more than latents"),
    Case("pipeline", "a UNet for other text", edited(UNET, cross_attention_dim=24), "unet: "),
    Case("pixel", "a UNet of another width", edited(UNET, block_out_channels=[32, 32]), "unet: "),
]  # fmt: skip
NUMBERS = [
    *values(UNET, "sample_size", [None, 0, -1, 1.5, "16", True, [], [16], [16, 16, 16], [16, None]], "sample_size"),
    *values(UNET, "sample_size", [None, 0, "16", [8, 8, 8]], "sample_size", "pixel"),
    *values(VAE, "scaling_factor", [0, -0.18, None, "0.18215", float("nan"), float("inf"), [1], True],
            "scaling_factor"),
    *values(VAE, "scaling_factor", [0, None, float("nan")], "scaling_factor", "autoencoder"),
    *values(VAE, "latent_channels", [3, None, "4"], "vae"),
    *values(SCHEDULER, "prediction_type", ["flow", "epsilonn", None, 3, "v_predicton"], "predicts"),
    *values(SCHEDULER, "num_train_timesteps", [None, 0, -1, "1000", 1.5, [1000]], "num_train_timesteps"),
    *values(SCHEDULER, "num_train_timesteps", [0, None], "num_train_timesteps", "pixel"),
    *values(SCHEDULER, "beta_schedule", ["scaled_linearr", None, 3], "scheduler_config.json: "),
    *values(SCHEDULER, "beta_start", [None, "small", float("nan"), -1, 2], "scheduler_config.json: "),
    *values(SCHEDULER, "trained_betas", [[], [0.1], "betas"], "scheduler_config.json: "),
    Case("pipeline", "betas with a typo", both(edited(SCHEDULER, beta_strat=1e-4), edited(SCHEDULER, "beta_start")),
         "beta_strat.*beta_start"),
    Case("pipeline", "a prediction type with a typo",
         both(edited(SCHEDULER, prediction_typ="v_prediction"), edited(SCHEDULER, "prediction_type")),
         "prediction_typ.*prediction_type"),
    Case("pixel", "another prediction", edited(SCHEDULER, prediction_type="v_prediction"), "epsilon"),
]  # fmt: skip
TOKENIZERS = [
    Case("pipeline", "no tokenizer_config.json", without(TOKENIZER), "tokenizer"),
    *values(TOKENIZER, "model_max_length", [10**30, 78, 0, -1, None, "77", 77.5], "tokenizer.*model_max_length"),
    Case("pipeline", "no length", edited(TOKENIZER, "model_max_length"), "tokenizer.*model_max_length"),
    Case("pipeline", "no vocabulary", without("tokenizer/vocab.json"), "tokenizer"),
    Case("pipeline", "a vocabulary that is torn", truncated("tokenizer/vocab.json", 0.5), "tokenizer"),
    Case("pipeline", "a vocabulary that is a list", dumped("tokenizer/vocab.json", ["a"]), "tokenizer"),
    Case("pipeline", "a vocabulary of nothing", dumped("tokenizer/vocab.json", {}), "tokenizer"),
    Case("pipeline", "words that the text encoder has not", edited("tokenizer/vocab.json", kite=9999), "tokenizer"),
    Case("pipeline", "no merges", without("tokenizer/merges.txt"), "tokenizer"),
    Case("pipeline", "merges that are noise", written("tokenizer/merges.txt", b"\xff\xfe\x00"), "tokenizer"),
    Case("clip", "no length", edited("tokenizer_config.json", "model_max_length"), "model_max_length"),
    Case("clip", "no vocabulary", both(without("tokenizer.json"), without("vocab.json")), "clip"),
    Case("clip", "a tokenizer that is torn", truncated("tokenizer.json", 0.5), "clip"),
]  # fmt: skip
INDEXES = [
    Case("pipeline", "no folder of the UNet", lambda folder: shutil.rmtree(folder / "unet"), "unet"),
    Case("pipeline", "no folder of the tokenizer", lambda folder: shutil.rmtree(folder / "tokenizer"), "tokenizer"),
    Case("pipeline", "nothing but an index", emptied, "no such file"),
    *values(INDEX, "_class_name", [["my_pipeline", "Pipeline"], None, 3], "_class_name"),
    *[Case("pipeline", f"a scheduler of another family: {name}",
           both(edited(INDEX, scheduler=["diffusers", name]), edited(SCHEDULER, _class_name=name)), "scheduler")
      for name in OTHER_FAMILIES],
    *values(INDEX, "scheduler", [None, [None, None], ["diffusers", "NoScheduler"], ["diffusers", "AutoencoderKL"],
            ["my_scheduler", "Evil"], ["diffusers", "__doc__"], "DDIMScheduler"], "scheduler"),
    *values(INDEX, "unet", [None, [None, None], ["my_unet", "Evil"], ["diffusers", "UNet2DModel"],
            ["diffusers", "FluxTransformer2DModel"], "unet"], "unet"),
    *values(INDEX, "text_encoder", [None, [None, None], ["transformers", "T5EncoderModel"], ["evil", "E"]],
            "text_encoder"),
    *values(INDEX, "vae", [None, [None, None], ["diffusers", "AutoencoderTiny"]], "vae"),
    *values(INDEX, "tokenizer", [None, [None, None], ["transformers", "T5Tokenizer"], ["evil", "Evil"]], "tokenizer"),
    *values(INDEX, "unet", [None, ["my_unet", "Evil"], ["diffusers", "UNet2DConditionModel"]], "unet", "pixel"),
    *values(INDEX, "scheduler", [None, ["my_scheduler", "Evil"], ["diffusers", "AmusedScheduler"]], "scheduler",
            "pixel"),
    Case("pixel", "no index", without(INDEX), "model_index.json"),
    Case("clip", "no config", without("config.json"), "config.json"),
    Case("autoencoder", "no folder", lambda folder: shutil.rmtree(folder / "vae"), "vae"),
]  # fmt: skip
AREAS = {  # by the name that docs/reliability.md has for them
    "weights: missing, torn, pickled, elsewhere": WEIGHTS,
    "configs: missing, torn, naming code": CONFIGS,
    "configs of networks: other weights, kernels, typos": NETWORKS,
    "parts that do not belong together": TOGETHER,
    "numbers that make no sense": NUMBERS,
    "tokenizers": TOKENIZERS,
    "indexes, and schedulers of other families": INDEXES,
}
CASES = [case for cases in AREAS.values() for case in cases]


def _key(case: Case) -> str:
    return f"{case.kind}: {case.name}"


@pytest.fixture
def shut(monkeypatch, tmp_path):
    """Whoever unpickles, opens a socket or starts a thread of its own is stopped."""

    def refuse(*args, **kwargs):
        raise AssertionError("this must never be reached")

    monkeypatch.setenv("CANARY", str(tmp_path / "canary"))
    monkeypatch.setattr(torch, "load", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    yield
    assert not (tmp_path / "canary").exists()
    assert not [thread for thread in threading.enumerate() if "conversion" in thread.name]


@pytest.fixture
def damaged(tmp_path):
    """Makes a damaged copy; its path has the kind's name, which a message may hold."""

    def make(case: Case) -> Path:
        folder = tmp_path / case.kind
        shutil.copytree(KINDS[case.kind].whole, folder, copy_function=os.link)
        case.damage(folder)
        return folder

    return make


@pytest.mark.parametrize("case", CASES, ids=_key)
def test_a_damaged_checkpoint_is_one_clear_line(case, damaged, shut):
    folder = damaged(case)
    with pytest.raises(InputError) as caught:
        KINDS[case.kind].load(str(folder))
    said = str(caught.value)
    assert "\n" not in said and len(said) < 600 and re.search(case.said, said), said


@pytest.mark.parametrize("name", ["x" * 5000, "a/b/c", "/nowhere", "two\nlines", __file__, "no/such/model"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_folder_is_one_clear_line(kind, name, shut):
    with pytest.raises(InputError) as caught:
        KINDS[kind].load(name)
    assert "\n" not in str(caught.value).replace(name, "")


@pytest.mark.parametrize("kind", KINDS)
def test_a_whole_checkpoint_is_loaded(kind, damaged, shut):
    assert KINDS[kind].load(str(damaged(Case(kind, "", lambda folder: None, ""))))


# Odd, but whole: what must load as ever. Old and other programs write such checkpoints.
def old_attention(w: dict) -> dict:
    """The autoencoder's attention as checkpoints of 2022 name it."""
    names = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    renamed = {}
    for key, value in w.items():
        for new, old in names.items():
            key = key.replace(new, old) if ".attentions." in key else key
        renamed[key] = value
    return renamed


ODD = {
    "half precision": weights(f"unet/{DIFFUSERS}", lambda w: {name: value.half() for name, value in w.items()}),
    "shards": sharded(f"unet/{DIFFUSERS}", "diffusion_pytorch_model-00001-of-00001.safetensors"),
    "shards of text": sharded(f"text_encoder/{TRANSFORMERS}", "model-00001-of-00001.safetensors"),
    "positions": weights(f"text_encoder/{TRANSFORMERS}",
                         lambda w: {**w, "text_model.embeddings.position_ids": torch.arange(77)[None]}),
    "a whole CLIP": both(
        weights(f"text_encoder/{TRANSFORMERS}", lambda w: {**w, "logit_scale": torch.ones([]),
                "visual_projection.weight": torch.ones(2, 2), "vision_model.post_layernorm.bias": torch.ones(2)}),
        edited(TEXT, model_type="clip")),
    "old attention": weights(f"vae/{DIFFUSERS}", old_attention),
    "a pickle beside it": lambda folder: torch.save({"weight": Canary()}, folder / "unet" / "extra.bin"),
    "keys of other versions": both(
        edited(UNET, dual_attention=False, mid_block_kind=None), edited(VAE, block_kind="a"),
        edited(SCHEDULER, skip_prk_steps=True, solver_order=2), edited(TEXT, torch_dtype="float16")),
    "attention of torch": both(edited(TEXT, _attn_implementation="eager")),
    "another pipeline of the same parts": edited(INDEX, _class_name="StableDiffusionImg2ImgPipeline"),
    "a fast tokenizer": edited(INDEX, tokenizer=["transformers", "CLIPTokenizerFast"]),
    "a zero terminal signal": edited(SCHEDULER, rescale_betas_zero_snr=True, prediction_type="v_prediction"),
    "latents that are no square": edited(UNET, sample_size=[16, 8]),
}  # fmt: skip


@pytest.fixture(scope="module")
def whole():
    return load_stable_diffusion(str(GOLDEN / "tiny-eps"))


@pytest.mark.parametrize("name", ODD)
def test_an_odd_checkpoint_is_loaded(name, whole, damaged, shut):
    pipe = load_stable_diffusion(str(damaged(Case("pipeline", name, ODD[name], ""))))
    for part in ("unet", "text_encoder", "vae"):
        own, other = (getattr(one, part).state_dict() for one in (pipe, whole))
        assert all(torch.allclose(own[key].float(), other[key], atol=1e-3) for key in other)


# But for one of another family, and one that needs a package more.
@pytest.mark.parametrize(
    "name", sorted({kind.name for kind in KarrasDiffusionSchedulers} - {"EDMEulerScheduler", "DPMSolverSDEScheduler"})
)
def test_every_scheduler_of_the_family_is_taken(name, tmp_path):
    for part in ("scheduler", ""):
        (tmp_path / part).mkdir(exist_ok=True)
    config = json.loads((GOLDEN / "tiny-eps" / SCHEDULER).read_bytes())
    dumped(SCHEDULER, {**config, "_class_name": name})(tmp_path)
    assert type(load_scheduler(tmp_path, {"scheduler": ["diffusers", name]})).__name__ == name


def test_the_page_counts_these_cases():
    said = (GOLDEN.parent.parent / "docs" / "reliability.md").read_text(encoding="utf-8")
    assert f"{len(CASES)} damaged checkpoints" in said and len({_key(case) for case in CASES}) == len(CASES)
    for area, cases in AREAS.items():
        assert f"| {area} | {len(cases)} |" in said


# What a run depends on: the file that is changed, and the setting that is named. The change leaves the model whole.
def scaled(file: str) -> Damage:
    return weights(file, lambda w: {name: value * 1.01 for name, value in w.items()})


CHANGES = {
    f"unet/{DIFFUSERS}": ("revision.unet", scaled(f"unet/{DIFFUSERS}")),
    UNET: ("revision.unet", edited(UNET, norm_eps=1e-3)),
    f"text_encoder/{TRANSFORMERS}": ("revision.text_encoder", scaled(f"text_encoder/{TRANSFORMERS}")),
    TEXT: ("revision.text_encoder", edited(TEXT, layer_norm_eps=1e-3)),
    SCHEDULER: ("revision.scheduler", edited(SCHEDULER, prediction_type="v_prediction")),
    "the schedule": ("revision.scheduler", edited(SCHEDULER, beta_end=0.011)),
    TOKENIZER: ("revision.tokenizer", edited(TOKENIZER, model_max_length=32)),
    "tokenizer/merges.txt": ("revision.tokenizer", written("tokenizer/merges.txt", b"#version: 0.1\n")),
}
OF_PICTURES = {
    f"vae/{DIFFUSERS}": ("revision.vae", scaled(f"vae/{DIFFUSERS}")),
    VAE: ("revision.vae", edited(VAE, scaling_factor=0.2)),
}


@pytest.mark.parametrize("name", [*CHANGES, *OF_PICTURES])
def test_a_run_is_refused_whose_checkpoint_has_changed(name, damaged, tmp_path, run_script, prompt_file):
    """Of pictures, where the autoencoder counts; prompts are scored without one, and go on."""
    setting, change = {**CHANGES, **OF_PICTURES}[name]
    folder = damaged(Case("pipeline", name, lambda folder: None, ""))
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for number in range(2):
        Image.new("RGB", (32, 32), (80 * number, 9, 9)).save(pictures / f"{number}.png")
    of_prompts = ("--prompts", prompt_file, "--out", tmp_path / "prompts")
    of_pictures = ("--images", pictures, "--set", "p_laplace.points=4", "--out", tmp_path / "run")
    runs = [("--model", folder, "--device", "cpu", "--dtype", "float32", *own) for own in (of_prompts, of_pictures)]
    for arguments in runs:
        run_script(detect_mem, *arguments)
    change(folder)
    for arguments in runs[name in OF_PICTURES :]:
        with pytest.raises(InputError, match=rf"holds a run with other settings \({setting}: sha256:\w+ there"):
            run_script(detect_mem, *arguments)
    if name in OF_PICTURES:
        run_script(detect_mem, *runs[0])


def test_a_judge_is_told_from_others(tmp_path):
    """By its CLIP's files and by the training pictures' content, not by their names."""
    clip = tmp_path / "clip"
    shutil.copytree(SHIPPED / "clip", clip, copy_function=os.link)
    picture = tmp_path / "a.png"

    def described(shade: int) -> dict:
        Image.new("RGB", (64, 64), (shade, 9, 9)).save(picture)
        return Judge(TrainingPictures.read([picture], (64, 64)), Clip(str(clip))).description["revision"]

    first, same, other = described(1), described(1), described(2)
    assert first == same and first["training"] != other["training"] and first["clip"] == other["clip"]
    scaled(TRANSFORMERS)(clip)
    assert described(1)["clip"] != first["clip"]


def test_an_index_is_told_from_others(tmp_path):
    """By its features, and by the weights that made them; weights that changed since are refused."""
    clip, picture = tmp_path / "clip", tmp_path / "pictures" / "a.png"
    shutil.copytree(SHIPPED / "clip", clip, copy_function=os.link)
    picture.parent.mkdir()
    digests = set()
    for number, shade in enumerate((1, 200)):
        Image.new("RGB", (64, 64), (shade, 9, 9)).save(picture)
        index = build_index(picture.parent, tmp_path / f"index{number}", "clip", model=str(clip))
        digests.add(index.digest)
    assert len(digests) == 2
    scaled(TRANSFORMERS)(clip)
    with pytest.raises(InputError, match="made with other weights"):
        Index(tmp_path / "index0").describe  # noqa: B018 - read for what it raises
    with pytest.raises(InputError, match="holds an index of another kind, size or network"):
        build_index(picture.parent, tmp_path / "index0", "clip", model=str(clip))


# Numbers that are none: where they come from, and what is said of them.
NAN = {
    "the UNet's last layer": (f"unet/{DIFFUSERS}", "conv_out.bias"),
    "the text encoder": (f"text_encoder/{TRANSFORMERS}", "text_model.final_layer_norm.weight"),
    "the decoder": (f"vae/{DIFFUSERS}", "decoder.conv_out.bias"),
    "the decoder's middle": (f"vae/{DIFFUSERS}", "post_quant_conv.weight"),
}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", NAN)
def test_no_picture_is_made_of_what_is_no_number(name, value, damaged):
    file, key = NAN[name]
    spoil = weights(file, lambda w: {**w, key: torch.full_like(w[key], value)})
    pipe = load_stable_diffusion(str(damaged(Case("pipeline", name, spoil, ""))))
    cases = Cases(pipe, pipe.pure_noise(1, 0), 3, 7.5, 51, 2)
    for case in cases.batches(["red kite", "two boats"]):
        with pytest.raises(InputError, match=r"NaN or infinite for '(red kite|two boats)'; try --dtype float32"):
            sample(case, Remedy.unchanged(case))


@pytest.mark.parametrize("key", ["encoder.conv_in.bias", "quant_conv.weight"])
def test_no_picture_is_read_into_what_is_no_number(key, damaged, tmp_path):
    spoil = weights(f"vae/{DIFFUSERS}", lambda w: {**w, key: torch.full_like(w[key], torch.nan)})
    pipe = load_stable_diffusion(str(damaged(Case("pipeline", key, spoil, ""))))
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    with pytest.raises(InputError, match=r"the encoded picture is NaN or infinite for '.*a\.png'"):
        encode(pipe, [str(tmp_path / "a.png")])


def test_no_pixels_are_made_of_what_is_no_number(damaged):
    spoil = weights(
        f"unet/{DIFFUSERS}", lambda w: {**w, "conv_out.bias": torch.full_like(w["conv_out.bias"], torch.inf)}
    )
    pipe = load_pixel_model(str(damaged(Case("pixel", "", spoil, ""))))
    with pytest.raises(InputError, match="NaN or infinite for 'picture 7'"):
        sample_pixels(pipe, [7], steps=3)
    with pytest.raises(InputError, match="--steps 2000: the model was trained on 1000 timesteps"):
        sample_pixels(pipe, [7], steps=2000)


def test_no_picture_is_judged_by_what_is_no_number(damaged):
    spoil = weights(
        TRANSFORMERS, lambda w: {**w, "visual_projection.weight": w["visual_projection.weight"] * torch.nan}
    )
    clip = Clip(str(damaged(Case("clip", "", spoil, ""))))
    judge = Judge(TrainingPictures.read([], (64, 64)), clip)
    with pytest.raises(InputError, match="clip is NaN or infinite for 'a kite'"):
        judge(np.zeros((2, 64, 64, 3), np.uint8), "a kite")


@pytest.mark.parametrize("scale", ["nan", "inf", "-inf", "-1", "-0.001", "seven"])
def test_a_guidance_scale_is_a_number(scale, run_script, prompt_file):
    for module in (detect_mem, mitigate_mem):
        with pytest.raises(InputError, match=f"--guidance-scale.* {scale} is no number of at least 0"):
            run_script(module, "--model", GOLDEN / "tiny-eps", "--prompts", prompt_file, f"--guidance-scale={scale}")


@pytest.mark.parametrize(("trained", "steps"), [(20, 50), (50, 50), (400, 500), (3, 3), (2, 3)])
def test_more_steps_than_the_model_was_trained_on(trained, steps, damaged, run_script, prompt_file, tmp_path):
    folder = damaged(Case("pipeline", "", edited(SCHEDULER, num_train_timesteps=trained), ""))
    said = f"--steps {steps}: the checkpoint was trained on {trained} timesteps, too few for such a grid"
    with pytest.raises(InputError, match=said):
        run_script(detect_mem, "--model", folder, "--prompts", prompt_file, "--steps", steps, "--out", tmp_path / "run")
    with pytest.raises(InputError, match=said):
        detection_grid(load_stable_diffusion(str(folder)), steps)
