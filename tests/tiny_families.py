"""Tiny pipelines of other families, with random weights: nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from conftest import GOLDEN
from diffusers import (
    AutoencoderKL,
    ChromaPipeline,
    ChromaTransformer2DModel,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

WIDTH = 16


def tokenizer() -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(GOLDEN / "tiny-eps" / "tokenizer")


def text_encoder(cls, words: int):
    config = CLIPTextConfig(
        hidden_size=WIDTH, intermediate_size=WIDTH, num_attention_heads=2, num_hidden_layers=2, vocab_size=words,
        projection_dim=WIDTH, bos_token_id=0, eos_token_id=2,
    )  # fmt: skip
    return cls(config).eval()


def letters() -> PreTrainedTokenizerFast:
    """A tokenizer that ends a text as T5's does: letters, and no start token."""
    known = {one: i for i, one in enumerate(["<pad>", "</s>", "<unk>", *"abcdefghijklmnopqrstuvwxyz", "▁kite"])}
    made = Tokenizer(models.WordLevel(known, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    made.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )


def t5() -> T5EncoderModel:
    config = T5Config(vocab_size=30, d_model=WIDTH, d_kv=8, d_ff=WIDTH, num_layers=2, num_heads=2)
    return T5EncoderModel(config).eval()


def autoencoder(**options) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2,
        norm_num_groups=4, latent_channels=4, **options,
    ).eval()  # fmt: skip


def sdxl(**options) -> StableDiffusionXLPipeline:
    """``options``: of the UNet."""
    torch.manual_seed(0)
    words = tokenizer()
    unet = UNet2DConditionModel(
        block_out_channels=(8, 16), layers_per_block=1, sample_size=16, norm_num_groups=4,
        cross_attention_dim=2 * WIDTH,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4), use_linear_projection=True, addition_embed_type="text_time",
        addition_time_embed_dim=4, projection_class_embeddings_input_dim=6 * 4 + WIDTH, **options,
    ).eval()  # fmt: skip
    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="leading", steps_offset=1
    )
    pipe = StableDiffusionXLPipeline(
        vae=autoencoder(), text_encoder=text_encoder(CLIPTextModel, len(words)),
        text_encoder_2=text_encoder(CLIPTextModelWithProjection, len(words)), tokenizer=words, tokenizer_2=words,
        unet=unet, scheduler=scheduler, add_watermarker=False,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sd3() -> StableDiffusion3Pipeline:
    torch.manual_seed(0)
    words = tokenizer()
    transformer = SD3Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8,
        num_attention_heads=2, caption_projection_dim=16, joint_attention_dim=2 * WIDTH,
        pooled_projection_dim=2 * WIDTH,
    ).eval()  # fmt: skip
    for block in transformer.transformer_blocks:  # at first these let nothing of the prompt through
        torch.nn.init.normal_(block.norm1.linear.weight, std=0.5)
    torch.nn.init.normal_(transformer.proj_out.weight, std=0.5)
    pipe = StableDiffusion3Pipeline(
        transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=autoencoder(shift_factor=0.1), text_encoder=text_encoder(CLIPTextModelWithProjection, len(words)),
        tokenizer=words, text_encoder_2=text_encoder(CLIPTextModelWithProjection, len(words)), tokenizer_2=words,
        text_encoder_3=None, tokenizer_3=None,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def pixart() -> PixArtSigmaPipeline:
    torch.manual_seed(0)
    transformer = PixArtTransformer2DModel(
        sample_size=32, patch_size=4, in_channels=4, out_channels=8, num_layers=2, attention_head_dim=8,
        num_attention_heads=2, cross_attention_dim=16, caption_channels=WIDTH, use_additional_conditions=False,
    ).eval()  # fmt: skip
    torch.nn.init.normal_(transformer.proj_out.weight, std=0.5)
    scheduler = DPMSolverMultistepScheduler(beta_start=0.0001, beta_end=0.02, beta_schedule="linear")
    pipe = PixArtSigmaPipeline(
        tokenizer=letters(), text_encoder=t5(), vae=autoencoder(), transformer=transformer, scheduler=scheduler
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def flux(guided: bool = True) -> FluxPipeline:
    """dev, or ``guided=False`` schnell."""
    torch.manual_seed(0)
    words = tokenizer()
    transformer = FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=WIDTH, pooled_projection_dim=WIDTH, guidance_embeds=guided, axes_dims_rope=(4, 4, 8),
    ).eval()  # fmt: skip
    for block in transformer.transformer_blocks:
        torch.nn.init.normal_(block.norm1.linear.weight, std=0.5)
    torch.nn.init.normal_(transformer.proj_out.weight, std=0.5)
    pipe = FluxPipeline(
        transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=autoencoder(shift_factor=0.1), text_encoder=text_encoder(CLIPTextModel, len(words)), tokenizer=words,
        text_encoder_2=t5(), tokenizer_2=letters(),
    )  # fmt: skip
    pipe.default_sample_size = 16
    pipe.set_progress_bar_config(disable=True)
    return pipe


def chroma() -> ChromaPipeline:
    """Of a family that has no file here."""
    torch.manual_seed(0)
    transformer = ChromaTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=WIDTH, axes_dims_rope=(4, 4, 8), approximator_num_channels=16, approximator_hidden_dim=16,
        approximator_layers=1,
    ).eval()  # fmt: skip
    torch.nn.init.normal_(transformer.proj_out.weight, std=0.5)
    pipe = ChromaPipeline(
        transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), vae=autoencoder(),
        text_encoder=t5(), tokenizer=letters(),
    )  # fmt: skip
    pipe.default_sample_size = 16
    pipe.set_progress_bar_config(disable=True)
    return pipe


def saved_in(home: Path, **made: Path) -> Callable[[str], Path]:
    """What gives the folder of a tiny pipeline by its name, under ``home``, made when it is asked for first.

    Args:
        made: folders that are there.
    """

    def folder(name: str) -> Path:
        if name not in made:
            globals()[name]().save_pretrained(home / name)
            made[name] = home / name
        return made[name]

    return folder
