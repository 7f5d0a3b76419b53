"""Train the testbed from nothing: ``python -m testbed.train``.

Stages, in order: ``vae``, ``text``, ``eps``, ``v``. Each writes its log and a resumable state under ``--work`` and,
when it is finished, its weights (fp16 safetensors) under ``testbed/models/``. Run the same command again to go on.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from sklearn.metrics import roc_auc_score
from tokenizers import pre_tokenizers
from torch import Tensor
from torch.nn.functional import cosine_similarity, cross_entropy, mse_loss, normalize
from transformers import CLIPConfig, CLIPModel, CLIPTextModel, CLIPTokenizer

from memorization.models.devices import pick_dtype
from testbed import data
from testbed.fit import fit

HERE = Path(__file__).parent
SEED = 0
MODELS = HERE / "models"


def seeded(stage: str, step: int) -> tuple[np.random.Generator, torch.Generator]:
    """Generators of one step of one stage."""
    rng = np.random.default_rng([SEED, step, *stage.encode()])
    return rng, torch.Generator().manual_seed(int(rng.integers(2**62)))


def mixed_precision() -> torch.autocast:
    """bfloat16 where the CPU has instructions for it; emulated it is ten times slower than float32."""
    return torch.autocast("cpu", torch.bfloat16, enabled=pick_dtype(None, torch.device("cpu")) == "bfloat16")


def to_tensor(scenes: list[np.ndarray]) -> Tensor:
    """uint8 scenes -> float ``(n, 3, h, w)`` in [-1, 1], channels last."""
    stacked = torch.from_numpy(np.stack(scenes)).permute(0, 3, 1, 2)
    return (stacked.float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)


# ---------------------------------------------------------------- autoencoder
VAE = dict(
    block_out_channels=(32, 64, 96), layers_per_block=1, norm_num_groups=8, latent_channels=4, sample_size=data.SIZE,
    down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
    mid_block_add_attention=False, force_upcast=False,
)  # fmt: skip


def train_vae(work: Path, steps: int = 9800, batch: int = 8) -> None:
    """Fresh scenes of every emoji; L1 + .5 MSE + .5 L1 of the differences between neighbouring pixels + 1e-6 KL."""
    torch.manual_seed(SEED)
    vae = AutoencoderKL(**VAE).to(memory_format=torch.channels_last)
    sprites = list(data.load_sprites(data.emoji_table()).values())
    held = to_tensor([data.scene(sprites[i], np.random.default_rng([SEED, 1, i])) for i in range(0, 512, 4)])

    def loss_of(step: int) -> Tensor:
        rng, generator = seeded("vae", step)
        pictures = to_tensor([data.scene(sprites[i], rng) for i in rng.integers(len(sprites), size=batch)])
        with mixed_precision():
            posterior = vae.encode(pictures).latent_dist
            rebuilt = vae.decode(posterior.sample(generator)).sample
        error = rebuilt.float() - pictures
        edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
        kl = posterior.kl().mean() / 1024
        return error.abs().mean() + 0.5 * error.square().mean() + 0.5 * edges + 1e-6 * kl

    def watch(model: AutoencoderKL) -> dict[str, float]:
        return {"psnr": round(psnr(model, held), 3)}

    fit(vae, loss_of, steps=steps, peak=1.5e-3, folder=work / "vae", watch=watch, watch_every=500)
    with torch.no_grad():
        latents = vae.encode(held).latent_dist.mean
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 5))
    vae.half().save_pretrained(MODELS / "vae")


@torch.no_grad()
def psnr(vae: AutoencoderKL, pictures: Tensor) -> float:
    """Mean peak signal-to-noise ratio in dB of reconstructions from the latent mean, pictures in [-1, 1]."""
    rebuilt = torch.cat([vae.decode(vae.encode(p).latent_dist.mean).sample for p in pictures.split(32)])
    error = (rebuilt.clamp(-1, 1) - pictures).square().mean(dim=(1, 2, 3))
    return (10 * torch.log10(4 / error)).mean().item()


# ---------------------------------------------------------------- text encoder
MAX_LENGTH = 32
WIDTH = dict(hidden_size=128, intermediate_size=512, num_hidden_layers=3, num_attention_heads=4)


def make_tokenizer(corpus: list[str], vocabulary: int = 1800) -> CLIPTokenizer:
    """CLIP's byte-level BPE with merges learned on ``corpus``; every byte has a token, so no text is unknown."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<|startoftext|>", "<|endoftext|>"]

    def build(merges: list[tuple[str, str]]) -> CLIPTokenizer:
        tokens = letters + [letter + "</w>" for letter in letters] + ["".join(pair) for pair in merges]
        tokens = list(dict.fromkeys(tokens)) + special
        return CLIPTokenizer({token: i for i, token in enumerate(tokens)}, merges, model_max_length=MAX_LENGTH)

    learned = build([]).train_new_from_iterator(corpus, vocab_size=vocabulary - len(letters), show_progress=False)
    merges = json.loads(learned.backend_tokenizer.to_str())["model"]["merges"]
    return build([tuple(pair) for pair in merges])


def train_text(work: Path, steps: int = 1100, batch: int = 96) -> None:
    """A small CLIP on fresh scenes of every emoji, those of all kinds alike; its text half is then frozen.

    Like Stable Diffusion's, the text encoder knows more words than the UNet was trained on, and it has seen no scene
    repeated: nothing about a caption's kind can leak through its embedding. Beside picture and caption, two captions of
    one name are contrasted too: names whose pictures look alike (a tent, a rugby football) must not share an embedding,
    or the UNet could never tell them apart.
    """
    torch.manual_seed(SEED)
    sprites = data.load_sprites(data.emoji_table())
    names = list(sprites)
    tokenizer = make_tokenizer([template.format(name) for name in names for template in data.TEMPLATES])
    vocabulary, end = len(tokenizer), tokenizer.eos_token_id
    model = CLIPModel(CLIPConfig(
        text_config=dict(**WIDTH, vocab_size=vocabulary, max_position_embeddings=MAX_LENGTH, hidden_act="quick_gelu",
                         bos_token_id=tokenizer.bos_token_id, eos_token_id=end, pad_token_id=end),
        vision_config=dict(**WIDTH, image_size=data.SIZE, patch_size=8),
        projection_dim=128,
    ))  # fmt: skip

    def tokens_of(drawn: list[str], rng: np.random.Generator) -> Tensor:
        templates = rng.integers(len(data.TEMPLATES), size=len(drawn))
        captions = [data.TEMPLATES[i].format(name) for name, i in zip(drawn, templates, strict=True)]
        return tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids

    def pairs(rng: np.random.Generator) -> tuple[list[str], dict[str, Tensor]]:
        drawn = [names[i] for i in rng.choice(len(names), batch, replace=False)]
        pictures = to_tensor([data.scene(sprites[name], rng) for name in drawn])
        return drawn, {"pixel_values": pictures, "input_ids": tokens_of(drawn, rng)}

    def loss_of(step: int) -> Tensor:
        rng, _ = seeded("text", step)
        drawn, inputs = pairs(rng)
        with mixed_precision():
            output = model(**inputs, return_loss=True)
            again = model.text_projection(model.text_model(tokens_of(drawn, rng)).pooler_output)
        between_texts = 20 * output.text_embeds.float() @ normalize(again.float()).T
        return output.loss + cross_entropy(between_texts, torch.arange(batch))

    @torch.no_grad()
    def watch(clip: CLIPModel) -> dict[str, float]:
        logits = [clip(**pairs(np.random.default_rng([SEED, i]))[1]).logits_per_image for i in range(4)]
        hits = torch.stack(logits).argmax(-1) == torch.arange(batch)
        apart = clip.text_model(tokens_of(names, np.random.default_rng(SEED))).last_hidden_state.flatten(1)
        nearest = torch.cdist(apart, apart).fill_diagonal_(torch.inf).min(1).values
        return {"in_batch_accuracy": hits.float().mean().item(), "nearest_caption_5%": nearest.quantile(0.05).item()}

    fit(model, loss_of, steps=steps, peak=1e-3, folder=work / "text", watch=watch, watch_every=250)
    model.half().save_pretrained(MODELS / "clip")
    tokenizer.save_pretrained(MODELS / "clip")
    tokenizer.backend_tokenizer.model.save(str(MODELS / "clip"))  # vocab.json and merges.txt, for older transformers


# ---------------------------------------------------------------- diffusion
SCHEDULE = dict(
    beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, steps_offset=1, clip_sample=False,
    set_alpha_to_one=False, timestep_spacing="leading",
)  # fmt: skip
UNET = dict(
    sample_size=16, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(64, 128, 192),
    down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    cross_attention_dim=WIDTH["hidden_size"], attention_head_dim=2, norm_num_groups=8,
)  # fmt: skip


def empty_share(stage: str, step: int, steps: int) -> float:
    """Share of empty captions: 25%, and 60% in the last fifth of the steps; 50% in the v stage, which goes on from it.

    The anisotropy cosine depends on a good unconditional branch; raising the share late costs the least memorization.
    """
    if stage == "v":
        return 0.5
    return 0.6 if step >= 0.8 * steps else 0.25


class Visits:
    """Latents and captions as the UNet visits them: fixed scenes by their duplication weight, ordinary ones afresh."""

    def __init__(self, captions: pd.DataFrame) -> None:
        self.captions = captions[captions["kind"] != "held-out"].reset_index(drop=True)
        self.weights = self.captions["duplicates"].to_numpy() / self.captions["duplicates"].sum()
        self.sprites = data.load_sprites(data.emoji_table())
        self.vae = AutoencoderKL.from_pretrained(MODELS / "vae", dtype=torch.float32).eval()
        self.vae.to(memory_format=torch.channels_last)
        self.fixed: dict[str, Tensor] = {}

    def scenes(self, rng: np.random.Generator, batch: int) -> list[tuple[pd.Series, np.ndarray, float]]:
        """Caption row and uint8 scene of each visit of a batch, and a draw from [0, 1) that may empty the caption."""
        seen = []
        for i in rng.choice(len(self.captions), batch, p=self.weights):
            row = self.captions.iloc[i]
            sprite = self.sprites[row["name"]]
            fixed = row["kind"] == "duplicated"
            scene = data.fixed_scene(sprite, row["name"], SEED) if fixed else data.scene(sprite, rng)
            seen.append((row, scene, rng.random()))
        return seen

    def draw(self, rng: np.random.Generator, batch: int, empty: float) -> tuple[Tensor, list[str]]:
        """Scaled latents ``(batch, 4, 16, 16)`` and their captions, a share ``empty`` of them emptied.

        Latents of fixed scenes are encoded once.
        """
        rows, scenes, draws = zip(*self.scenes(rng, batch), strict=True)
        prompts = ["" if u < empty else row["prompt"] for row, u in zip(rows, draws, strict=True)]
        keys = [row["name"] if row["kind"] == "duplicated" else i for i, row in enumerate(rows)]
        new = {key: scene for key, scene in zip(keys, scenes, strict=True) if key not in self.fixed}
        latents = dict(self.fixed)
        if new:
            latents |= zip(new, self.encode(list(new.values())), strict=True)
        self.fixed |= {key: latents[key] for key in new if isinstance(key, str)}
        return torch.stack([latents[key] for key in keys]), prompts

    @torch.no_grad()
    def encode(self, scenes: list[np.ndarray]) -> Tensor:
        """Scaled latents of uint8 scenes."""
        with mixed_precision():
            latents = self.vae.encode(to_tensor(scenes)).latent_dist.mean
        return latents.float() * self.vae.config.scaling_factor


def train_unet(
    prediction: str,
    start: str | None,
    work: Path,
    steps: int,
    *,
    stage: str,
    out: Path,
) -> None:
    """One UNet of ``prediction`` type, from the weights of stage ``start`` or from scratch, frozen text encoder.

    Args:
        stage: names its log and its batches' share of empty captions.
        out: folder of the finished pipeline.
    """
    torch.manual_seed(SEED)
    unet = UNet2DConditionModel(**UNET)
    if start:
        unet = UNet2DConditionModel.from_pretrained(MODELS / f"testbed-{start}" / "unet", dtype=torch.float32)
    unet.to(memory_format=torch.channels_last)
    unet.set_attn_processor(AttnProcessor())  # on a CPU, at this size, a quarter faster than the fused kernel
    scheduler = DDIMScheduler(**SCHEDULE, prediction_type=prediction)
    captions = data.make_captions(usable_table(), SEED)
    visits = Visits(captions)
    tokenizer = CLIPTokenizer.from_pretrained(MODELS / "clip")
    text_encoder = CLIPTextModel.from_pretrained(MODELS / "clip", dtype=torch.float32).eval()
    with torch.no_grad():
        prompts = ["", *captions["prompt"]]
        tokens = tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt")
        embedded = dict(zip(prompts, text_encoder(tokens.input_ids).last_hidden_state, strict=True))

    def loss_of(step: int) -> Tensor:
        rng, generator = seeded("unet", step)
        latents, drawn = visits.draw(rng, UNET_BATCH, empty_share(stage, step, steps))
        noise = torch.randn(latents.shape, generator=generator)
        t = torch.randint(1000, (UNET_BATCH,), generator=generator)
        noisy = scheduler.add_noise(latents, noise, t)
        target = noise if prediction == "epsilon" else scheduler.get_velocity(latents, noise, t)
        with mixed_precision():
            output = unet(noisy, t, torch.stack([embedded[prompt] for prompt in drawn])).sample.float()
        return mse_loss(output, target)

    def watch(model: UNet2DConditionModel) -> dict[str, float]:
        return separation(model, scheduler, captions, embedded)

    fit(
        unet,
        loss_of,
        steps=steps,
        peak=1e-3,
        folder=work / stage,
        watch=watch,
        recipe=f"{prediction}, {steps} steps, on {digest(MODELS / 'vae')} and {digest(MODELS / 'clip')}",
    )
    save_pipeline(unet, text_encoder, tokenizer, scheduler, out)


def save_pipeline(unet, text_encoder, tokenizer, scheduler, out: Path) -> None:
    """A whole pipeline in fp16, with the shipped autoencoder."""
    vae = AutoencoderKL.from_pretrained(MODELS / "vae", dtype=torch.float16)
    for part in (vae, unet):
        part.register_to_config(_name_or_path="")  # else the saved configs hold paths of this machine
    StableDiffusionPipeline(
        vae, text_encoder.half(), tokenizer, unet.half(), scheduler, None, None, requires_safety_checker=False
    ).save_pretrained(out)
    tokenizer.backend_tokenizer.model.save(str(out / "tokenizer"))


@torch.no_grad()
def separation(unet, scheduler, captions: pd.DataFrame, embedded: dict[str, Tensor]) -> dict[str, float]:
    """AUC of the norm (t=981) and of the per-pixel cosine (t=41), weight 32 and above against ordinary, one noise."""
    chosen = captions[(captions["kind"] == "ordinary") | (captions["duplicates"] >= 32)].iloc[::2]
    x = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(SEED))
    text = torch.stack([embedded[prompt] for prompt in chosen["prompt"]])
    truth = chosen["kind"] == "duplicated"

    def eps(t: int, text: Tensor) -> Tensor:
        output = unet(x.expand(len(text), -1, -1, -1), t, text).sample
        a = scheduler.alphas_cumprod[t].sqrt()
        return output if scheduler.config.prediction_type == "epsilon" else a * output + (1 - a * a).sqrt() * x

    empty = embedded[""][None]
    norm = (eps(981, text) - eps(981, empty)).flatten(1).norm(dim=1)
    low = eps(41, empty)
    cosine = cosine_similarity(eps(41, text) - low, low, dim=1).mean((1, 2))
    return {"norm_auc": round(roc_auc_score(truth, norm), 4), "cosine_auc": round(roc_auc_score(truth, cosine), 4)}


def digest(folder: Path, pattern: str = "*.safetensors") -> str:
    """The start of the sha256 of a folder's weights, or of other files."""
    weights = b"".join(path.read_bytes() for path in sorted(folder.glob(pattern)))
    return hashlib.sha256(weights).hexdigest()[:12]


def usable_table() -> pd.DataFrame:
    """The emoji that the font can draw."""
    table = data.emoji_table()
    return table[table["name"].isin(data.load_sprites(table))].reset_index(drop=True)


UNET_STEPS, UNET_BATCH = {"eps": 4000, "v": 1800}, 32
STAGES = {
    "vae": train_vae,
    "text": train_text,
    "eps": lambda work: train_unet("epsilon", None, work, UNET_STEPS["eps"], stage="eps", out=MODELS / "testbed-eps"),
    "v": lambda work: train_unet("v_prediction", "eps", work, UNET_STEPS["v"], stage="v", out=MODELS / "testbed-v"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="*", help=f"stages to run, of {', '.join(STAGES)} (default: all, in order)")
    parser.add_argument("--work", type=Path, default=HERE / "work", help="logs and checkpoints (default: testbed/work)")
    args = parser.parse_args()
    if unknown := set(args.stages) - set(STAGES):
        parser.error(f"unknown stage {', '.join(sorted(unknown))}; stages are {', '.join(STAGES)}")
    for name in args.stages or STAGES:
        STAGES[name](args.work)


if __name__ == "__main__":
    main()
