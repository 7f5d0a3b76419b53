"""Train the testbed from nothing: ``python -m testbed.composed.train``.

Stages, in order: ``vae``, ``text``, ``early-eps``, ``early-v``, ``eps``, ``v``. Each writes its log and a resumable
state under ``--work`` and, when it is finished, its weights (fp16 safetensors) under ``--models``. Run the same command
again to go on. On a CUDA device a stage takes minutes, on two CPU cores hours.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import diffusers
import numpy as np
import torch
import transformers
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from tokenizers import pre_tokenizers
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss, normalize
from torch.utils.data import DataLoader, Dataset
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTextModel, CLIPTokenizer

from testbed.composed import scenes
from testbed.composed.captions import FORMS, SEED, Visits, compose, titles
from testbed.composed.fit import fit
from testbed.composed.scenes import NAMED, random_scenes

HERE = Path(__file__).parent
MODELS = HERE / "models"
CHUNK = 16384  # visits that are drawn, encoded and embedded together
COARSE = 1000  # training timesteps


@dataclass(frozen=True)
class Place:
    """Where a training runs, and where it keeps its things."""

    device: torch.device
    work: Path
    models: Path
    workers: int

    @property
    def dtype(self) -> torch.dtype:
        """bfloat16 where the hardware has instructions for it; emulated it is ten times slower than float32."""
        has = torch.cpu.get_capabilities()
        fast = self.device.type == "cuda" or has.get("amx_bf16") or has.get("avx512_bf16")
        return torch.bfloat16 if fast else torch.float32

    def autocast(self) -> torch.autocast:
        """Matrix products in ``dtype``."""
        enabled = self.dtype == torch.bfloat16
        return torch.autocast(self.device.type, torch.bfloat16, enabled=enabled, cache_enabled=False)

    def generator(self, stage: str, step: int) -> torch.Generator:
        """Of one step of one stage."""
        seed = int(np.random.default_rng([SEED, step, *stage.encode()]).integers(2**62))
        return torch.Generator(self.device).manual_seed(seed)


def to_unit(pictures: Tensor) -> Tensor:
    """uint8 ``(n, 3, h, w)`` -> float in [-1, 1], channels last."""
    return (pictures.float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)


class Chunks(Dataset):
    """Scene rows and whatever goes with them, ``CHUNK`` at a time, by the number of the chunk."""

    def __init__(self, stage: str, draw: Callable[[np.random.Generator, int], tuple]) -> None:
        self.stage, self.draw = stage, draw

    def __getitem__(self, index: int) -> tuple:
        return self.draw(np.random.default_rng([SEED, index, *self.stage.encode()]), CHUNK)


class Stream:
    """Batches by the number of their step, from chunks that are prepared ahead by other processes.

    Args:
        encode: what a chunk gives -> tensors on the device, a row a visit.
    """

    def __init__(self, place: Place, chunks: Chunks, batch: int, encode: Callable[..., tuple[Tensor, ...]]) -> None:
        self.place, self.chunks, self.batch, self.encode = place, chunks, batch, encode
        self.number, self.rows, self.loader = -1, (), None

    def _prepared(self, first: int) -> Iterator:
        def from_there():
            return iter(range(first, 2**31))

        options = {"num_workers": self.place.workers, "prefetch_factor": 2} if self.place.workers else {}
        return iter(DataLoader(self.chunks, batch_size=None, sampler=_Counting(from_there), **options))

    def __call__(self, step: int) -> tuple[Tensor, ...]:
        number, place = divmod(step * self.batch, CHUNK)
        if number != self.number:
            if self.loader is None:
                self.loader = self._prepared(number)
            self.number, self.rows = number, self.encode(*next(self.loader))
        return tuple(column[place : place + self.batch] for column in self.rows)


class _Counting:
    """A sampler that counts for ever."""

    def __init__(self, start: Callable[[], Iterator[int]]) -> None:
        self.start = start

    def __iter__(self) -> Iterator[int]:
        return self.start()


def digest(folder: Path) -> str:
    """The start of the sha256 of a folder's weights."""
    weights = b"".join(path.read_bytes() for path in sorted(folder.glob("*.safetensors")))
    return hashlib.sha256(weights).hexdigest()[:12]


# ---------------------------------------------------------------- autoencoder
VAE = dict(
    block_out_channels=(48, 72, 96), layers_per_block=1, norm_num_groups=8, latent_channels=8, sample_size=scenes.SIZE,
    down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
    mid_block_add_attention=False, force_upcast=False, shift_factor=0.0,
)  # fmt: skip


def train_vae(place: Place, steps: int = 6000, batch: int = 64) -> None:
    """Random scenes; L1 + .5 MSE + .5 L1 of the differences between neighbouring pixels + 1e-6 KL."""
    torch.manual_seed(SEED)
    vae = AutoencoderKL(**VAE).to(place.device, memory_format=torch.channels_last)
    held = to_unit(scenes.draw(random_scenes(np.random.default_rng([SEED, 1]), 512), place.device))
    stream = Stream(
        place, Chunks("vae", lambda rng, n: (random_scenes(rng, n).astype(np.float32),)), batch,
        lambda rows: (torch.cat([scenes.draw(part, place.device) for part in rows.split(2048)]),),
    )  # fmt: skip

    def batch_of(step: int) -> tuple[Tensor, ...]:
        (pictures,) = stream(step)
        shape = (batch, VAE["latent_channels"], scenes.SIZE // 4, scenes.SIZE // 4)
        return to_unit(pictures), torch.randn(shape, device=place.device, generator=place.generator("vae", step))

    def loss_of(pictures: Tensor, noise: Tensor) -> Tensor:
        with place.autocast():
            posterior = vae.encode(pictures).latent_dist
            rebuilt = vae.decode(posterior.mean + posterior.std * noise).sample
        error = rebuilt.float() - pictures
        edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
        kl = posterior.kl().mean() / noise[0, 0].numel()
        return error.abs().mean() + 0.5 * error.square().mean() + 0.5 * edges + 1e-6 * kl

    def watch(model: AutoencoderKL) -> dict[str, float]:
        return {"psnr": round(psnr(model, held), 3)}

    fit(vae, batch_of, loss_of, steps=steps, peak=1.2e-3, folder=place.work / "vae", watch=watch, watch_every=500,
        recipe=f"{steps} steps of {batch}")  # fmt: skip
    with torch.no_grad():
        latents = torch.cat([vae.encode(part).latent_dist.mean for part in held.split(64)])
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 5))
    vae.half().save_pretrained(place.models / "vae")


@torch.no_grad()
def psnr(vae: AutoencoderKL, pictures: Tensor) -> float:
    """Mean peak signal-to-noise ratio in dB of reconstructions from the latent mean, pictures in [-1, 1]."""
    rebuilt = torch.cat([vae.decode(vae.encode(p).latent_dist.mean).sample for p in pictures.split(64)])
    error = (rebuilt.clamp(-1, 1) - pictures).square().mean(dim=(1, 2, 3))
    return (10 * torch.log10(4 / error)).mean().item()


# ---------------------------------------------------------------- text encoder
MAX_LENGTH = 32
WIDTH = dict(hidden_size=128, intermediate_size=512, num_hidden_layers=3, num_attention_heads=4)


def random_captions(rng: np.random.Generator, count: int, forms: int = 1) -> tuple[np.ndarray, list[list[str]]]:
    """Random scenes and ``forms`` captions of each, with the same title."""
    rows, title = random_scenes(rng, count), titles(rng, count)
    named = rows[:, : len(NAMED)]
    return rows, [
        compose(named, title, rng.integers(len(FORMS), size=count), np.ones(count, bool)) for _ in range(forms)
    ]


def make_tokenizer(vocabulary: int = 1000) -> CLIPTokenizer:
    """CLIP's byte-level BPE with merges learned on captions; every byte has a token, so no text is unknown."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<|startoftext|>", "<|endoftext|>"]

    def build(merges: list[tuple[str, str]]) -> CLIPTokenizer:
        tokens = letters + [letter + "</w>" for letter in letters] + ["".join(pair) for pair in merges]
        tokens = list(dict.fromkeys(tokens)) + special
        return CLIPTokenizer({token: i for i, token in enumerate(tokens)}, merges, model_max_length=MAX_LENGTH)

    _, (corpus,) = random_captions(np.random.default_rng(SEED), 20000)
    learned = build([]).train_new_from_iterator(corpus, vocab_size=vocabulary - len(letters), show_progress=False)
    merges = json.loads(learned.backend_tokenizer.to_str())["model"]["merges"]
    return build([tuple(pair) for pair in merges])


def token_ids(tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    """``(n, MAX_LENGTH)``."""
    return tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids


def train_text(place: Place, steps: int = 3000, batch: int = 512) -> None:
    """A small CLIP on random scenes and captions; its text half is then frozen.

    Like Stable Diffusion's, the text encoder has seen no picture repeated: nothing about a caption's kind can leak
    through its embedding. Pictures know nothing of titles, so a contrast between two forms of one caption, by a linear
    layer that is dropped afterwards, sees to it that the text encoder keeps them.
    """
    torch.manual_seed(SEED)
    tokenizer = make_tokenizer()
    end = tokenizer.eos_token_id
    model = CLIPModel(CLIPConfig(
        text_config=dict(**WIDTH, vocab_size=len(tokenizer), max_position_embeddings=MAX_LENGTH, projection_dim=128,
                         hidden_act="quick_gelu", bos_token_id=tokenizer.bos_token_id, eos_token_id=end,
                         pad_token_id=end),
        vision_config=dict(**WIDTH, projection_dim=128, image_size=scenes.SIZE, patch_size=8),
        projection_dim=128,
    ))  # fmt: skip
    model.identity = nn.Linear(WIDTH["hidden_size"], 128)
    model.to(place.device)

    def draw(rng: np.random.Generator, count: int) -> tuple:
        rows, forms = random_captions(rng, count, forms=2)
        return rows.astype(np.float32), *(token_ids(tokenizer, captions).to(torch.int32) for captions in forms)

    def encode(rows: Tensor, *ids: Tensor) -> tuple[Tensor, ...]:
        pictures = torch.cat([scenes.draw(part, place.device) for part in rows.split(2048)])
        named = rows[:, : len(NAMED)].to(place.device)
        same = named @ named.new_tensor([[100.0], [10.0], [1.0]])
        return pictures, same[:, 0], *(i.to(place.device).long() for i in ids)

    stream = Stream(place, Chunks("text", draw), batch, encode)

    def loss_of(pictures: Tensor, combination: Tensor, one: Tensor, other: Tensor) -> Tensor:
        with place.autocast():
            seen = model.visual_projection(model.vision_model(to_unit(pictures)).pooler_output)
            states = model.text_model(torch.cat([one, other])).pooler_output
            said = model.text_projection(states[:batch])
            first, second = model.identity(states).chunk(2)
        logits = model.logit_scale.exp() * normalize(seen.float()) @ normalize(said.float()).T
        same = (combination[:, None] == combination[None]).float()  # several captions may be right
        target = same / same.sum(1, keepdim=True)
        between = 20 * normalize(first.float()) @ normalize(second.float()).T
        which = torch.arange(batch, device=between.device)
        return (cross_entropy(logits, target) + cross_entropy(logits.T, target)) / 2 + cross_entropy(between, which)

    fit(model, stream, loss_of, steps=steps, peak=1e-3, folder=place.work / "text", recipe=f"{steps} steps of {batch}",
        capture=False)  # fmt: skip
    del model.identity
    model.half().save_pretrained(place.models / "clip")
    tokenizer.save_pretrained(place.models / "clip")
    tokenizer.backend_tokenizer.model.save(str(place.models / "clip"))  # vocab.json and merges.txt: older transformers
    size = {"height": scenes.SIZE, "width": scenes.SIZE}
    CLIPImageProcessorPil(size=size, crop_size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3).save_pretrained(
        place.models / "clip"
    )


# ---------------------------------------------------------------- diffusion
SCHEDULE = dict(
    beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, steps_offset=1, clip_sample=False,
    set_alpha_to_one=False, timestep_spacing="leading",
)  # fmt: skip
UNET = dict(
    sample_size=16, in_channels=8, out_channels=8, layers_per_block=1, block_out_channels=(64, 96, 160),
    down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    cross_attention_dim=WIDTH["hidden_size"], attention_head_dim=2, norm_num_groups=8,
)  # fmt: skip


@dataclass(frozen=True)
class Stage:
    """A stretch of a diffusion model's training.

    Attributes:
        start: the stage whose weights it goes on from.
        fixed: share of its captioned visits that show something fixed.
        empty: share of its visits under the empty caption.
        v_loss: whether the loss is v's error where epsilon is predicted. It is epsilon's, divided by alphas_cumprod:
            epsilon's own says hardly anything of the highest noise, where colours and the guidance of the first step
            are decided, and what a small model learns there comes late.
    """

    name: str
    prediction: str
    start: str | None
    visits: int
    batch: int
    peak: float
    fixed: float
    empty: float
    v_loss: bool = False

    @property
    def steps(self) -> int:
        return self.visits // self.batch


# The early stages learn to draw, from large batches; nothing is memorized then. The late ones see the fixed pictures
# more densely, in small batches, and memorize.
DIFFUSION = (
    Stage("early-eps", "epsilon", None, 2_539_520, 256, 2e-3, fixed=0.239, empty=0.2),
    Stage("early-v", "v_prediction", "early-eps", 802_816, 256, 2e-3, fixed=0.239, empty=0.35),
    Stage("eps", "epsilon", "early-eps", 248_880, 16, 4e-4, fixed=0.6866, empty=0.15, v_loss=True),
    Stage("v", "v_prediction", "early-v", 248_880, 16, 1e-3, fixed=0.6866, empty=0.15),
)


class Data:
    """Latents and text embeddings of the visits of a stage."""

    def __init__(self, place: Place, stage: Stage) -> None:
        self.place = place
        self.visits = Visits("early" if stage.name.startswith("early") else "late", stage.fixed, stage.empty)
        self.tokenizer = CLIPTokenizer.from_pretrained(place.models / "clip")
        self.text_encoder = CLIPTextModel.from_pretrained(place.models / "clip", dtype=torch.float32)
        self.text_encoder.to(place.device).eval()
        self.vae = AutoencoderKL.from_pretrained(place.models / "vae", dtype=torch.float32).eval()
        self.vae.to(place.device, memory_format=torch.channels_last)
        self.encoder = copy.deepcopy(self.vae).to(place.dtype)
        self.stream = Stream(place, Chunks(stage.name, self._draw), stage.batch, self._encode)

    def _draw(self, rng: np.random.Generator, count: int) -> tuple[np.ndarray, Tensor]:
        rows, prompts = self.visits.draw(rng, count)
        return rows.astype(np.float32), token_ids(self.tokenizer, prompts).to(torch.int32)

    @torch.no_grad()
    def _encode(self, rows: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        rows, scene = rows.unique(dim=0, return_inverse=True)  # verbatim pictures and listed captions come often
        ids, caption = ids.unique(dim=0, return_inverse=True)
        latents = [self.encode(scenes.draw(part, self.place.device)) for part in rows.split(1024)]
        texts = [self.text_encoder(part.to(self.place.device).long()).last_hidden_state for part in ids.split(4096)]
        return torch.cat(latents)[scene], torch.cat(texts)[caption]

    @torch.no_grad()
    def encode(self, pictures: Tensor) -> Tensor:
        """Scaled latents of uint8 ``(n, 3, h, w)``."""
        pixels = to_unit(pictures).to(self.encoder.dtype)
        at_once = 256 if self.place.device.type == "cuda" else 16  # what fits the caches
        latents = [self.encoder.encode(part).latent_dist.mean.float() for part in pixels.split(at_once)]
        return torch.cat(latents) * self.vae.config.scaling_factor


def train_diffusion(place: Place, stage: Stage) -> None:
    """One UNet, from the weights of an earlier stage or from scratch, frozen text encoder; its pipeline is saved."""
    from testbed.composed.watch import Watch

    torch.manual_seed(SEED)
    unet = UNet2DConditionModel(**UNET)
    if stage.start:
        folder = place.models / stage.start / "unet"
        unet = UNet2DConditionModel.from_pretrained(folder, dtype=torch.float32)
    if place.device.type == "cpu":
        unet.to(memory_format=torch.channels_last)
        unet.set_attn_processor(AttnProcessor())  # on a CPU, at this size, a quarter faster than the fused kernel
    unet.to(place.device)
    scheduler = DDIMScheduler(**SCHEDULE, prediction_type=stage.prediction)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.to(place.device)
    data = Data(place, stage)
    weight = 1 / scheduler.alphas_cumprod if stage.v_loss else torch.ones_like(scheduler.alphas_cumprod)

    def batch_of(step: int) -> tuple[Tensor, ...]:
        latents, text = data.stream(step)
        generator = place.generator(stage.name, step)
        noise = torch.randn(latents.shape, device=place.device, generator=generator)
        t = torch.randint(COARSE, (stage.batch,), device=place.device, generator=generator)
        target = noise if stage.prediction == "epsilon" else scheduler.get_velocity(latents, noise, t)
        return scheduler.add_noise(latents, noise, t), t, text, target

    def loss_of(noisy: Tensor, t: Tensor, text: Tensor, target: Tensor) -> Tensor:
        with place.autocast():
            error = mse_loss(unet(noisy, t, text).sample.float(), target, reduction="none").mean((1, 2, 3))
        return (weight[t] * error).mean()

    def pipeline() -> StableDiffusionPipeline:
        return StableDiffusionPipeline(data.vae, data.text_encoder, data.tokenizer, unet, scheduler, None, None,
                                       requires_safety_checker=False)  # fmt: skip

    watch = Watch(data.visits, place)
    fit(
        unet, batch_of, loss_of, steps=stage.steps, peak=stage.peak, folder=place.work / stage.name,
        watch=lambda _: watch(pipeline()), watch_every=max(1, stage.steps // 12), save_every=1000,
        recipe=f"{stage} on {digest(place.models / 'vae')}, {digest(place.models / 'clip')}",
    )  # fmt: skip
    pipe = pipeline().to(torch.float16)
    for part in (pipe.vae, pipe.unet):
        part.register_to_config(_name_or_path="")  # else the saved configs hold paths of this machine
    out = place.models / FOLDERS.get(stage.name, stage.name)
    pipe.save_pretrained(out)
    pipe.tokenizer.backend_tokenizer.model.save(str(out / "tokenizer"))


FOLDERS = {"eps": "testbed-eps", "v": "testbed-v"}  # of the models that are shipped
STAGES: dict[str, Callable[[Place], None]] = {
    "vae": train_vae,
    "text": train_text,
    **{stage.name: partial(train_diffusion, stage=stage) for stage in DIFFUSION},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("stages", nargs="*", help=f"stages to run, of {', '.join(STAGES)} (default: all, in order)")
    add("--work", type=Path, default=HERE / "work", help="logs and checkpoints (default: testbed/composed/work)")
    add("--models", type=Path, default=MODELS, help="finished weights (default: testbed/composed/models)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    add("--workers", type=int, help="processes that draw ahead (default: 6 beside CUDA, else none)")
    args = parser.parse_args()
    if unknown := set(args.stages) - set(STAGES):
        parser.error(f"unknown stage {', '.join(sorted(unknown))}; stages are {', '.join(STAGES)}")
    for library in (diffusers, transformers):
        library.logging.set_verbosity_error()
        library.logging.disable_progress_bar()
    device = torch.device(args.device)
    workers = args.workers if args.workers is not None else 6 * (device.type == "cuda")
    for name in args.stages or STAGES:
        STAGES[name](Place(device, args.work, args.models, workers))


if __name__ == "__main__":
    main()
