"""Denoisers of true size with random weights, their FLOPs, and ways of calling them faster."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import FlopCounterMode

# Dense TFLOP/s in bfloat16 (float16 has the same) by the name that the driver gives; NVIDIA's data sheets.
PEAK = {
    "NVIDIA A100-PCIE-40GB": 312, "NVIDIA A100-SXM4-40GB": 312, "NVIDIA A100 80GB PCIe": 312,
    "NVIDIA A100-SXM4-80GB": 312, "NVIDIA A40": 150, "NVIDIA L4": 121, "NVIDIA L40S": 362,
    "NVIDIA GeForce RTX 4090": 165, "NVIDIA H100 PCIe": 756, "NVIDIA H100 80GB HBM3": 989, "NVIDIA H200": 989,
}  # fmt: skip

Call = Callable[..., Tensor]


@dataclass(frozen=True)
class Denoiser:
    """How a family's denoiser is made and called.

    Attributes:
        config: of its true size.
        side: of its latents.
        words: length of the prompt's embedding.
        shallow: what differs in its config where the whole does not fit a card.
    """

    cls: type[nn.Module]
    config: dict
    side: int
    words: int
    shallow: dict = field(default_factory=dict)

    def make(self, device: torch.device, dtype: torch.dtype) -> nn.Module:
        """With random weights; shallow where the weights would fill more than half of the card."""
        with torch.device("meta"):
            module = self.cls(**self.config)
            size = sum(weights.numel() for weights in module.parameters()) * dtype.itemsize
            if device.type == "cuda" and size > torch.cuda.get_device_properties(device).total_memory / 2:
                module = self.cls(**self.config | self.shallow)
        module = module.to(dtype).to_empty(device=device).eval().requires_grad_(False)
        for weights in (*module.parameters(), *module.buffers()):
            weights.normal_(std=0.02)
        return module.to(memory_format=torch.channels_last)

    def inputs(self, module: nn.Module, rows: int) -> dict:
        """Arguments of a call of so many rows: what a pipeline passes, made up."""

        def normal(*shape: int) -> Tensor:
            return torch.randn(rows, *shape, device=module.device, dtype=module.dtype)

        config, time = module.config, torch.tensor(981, device=module.device)
        if self.cls is UNet2DConditionModel:
            given = {"sample": normal(config.in_channels, self.side, self.side), "timestep": time,
                     "encoder_hidden_states": normal(self.words, config.cross_attention_dim)}  # fmt: skip
            if config.addition_embed_type == "text_time":
                width = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
                given["added_cond_kwargs"] = {"text_embeds": normal(width), "time_ids": normal(6)}
            return given
        given = {"encoder_hidden_states": normal(self.words, config.joint_attention_dim),
                 "pooled_projections": normal(config.pooled_projection_dim)}  # fmt: skip
        if self.cls is SD3Transformer2DModel:
            latents = normal(config.in_channels, self.side, self.side)
            return {**given, "hidden_states": latents, "timestep": time.expand(rows)}
        place = torch.arange((self.side // 2) ** 2, device=module.device)
        places = torch.stack([0 * place, place // (self.side // 2), place % (self.side // 2)], dim=1)
        return {**given, "hidden_states": normal(len(place), config.in_channels), "img_ids": places,
                "txt_ids": places.new_zeros(self.words, 3), "timestep": normal(), "guidance": normal()}  # fmt: skip


SD14 = Denoiser(UNet2DConditionModel, {"sample_size": 64, "cross_attention_dim": 768}, side=64, words=77)
SDXL = Denoiser(
    UNet2DConditionModel,
    {"sample_size": 128, "block_out_channels": (320, 640, 1280), "attention_head_dim": (5, 10, 20),
     "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
     "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
     "transformer_layers_per_block": (1, 2, 10), "cross_attention_dim": 2048, "use_linear_projection": True,
     "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
     "projection_class_embeddings_input_dim": 2816}, side=128, words=77,
)  # fmt: skip
SD3 = Denoiser(
    SD3Transformer2DModel,
    {"num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536, "pos_embed_max_size": 192},
    side=128, words=333, shallow={"num_layers": 4},
)  # fmt: skip
FLUX = Denoiser(
    FluxTransformer2DModel, {"guidance_embeds": True}, side=128, words=512,
    shallow={"num_layers": 2, "num_single_layers": 4},
)  # fmt: skip


def plain_call(module: nn.Module) -> Call:
    """The denoiser's own forward, whatever stands in its place: arguments -> output."""
    forward = type(module).forward

    def call(**given) -> Tensor:
        return forward(module, **given, return_dict=False)[0]

    return call


def compiled(call: Call, given: dict) -> Call:
    """``call`` by torch.compile, for one shape."""
    backend = "inductor" if given["encoder_hidden_states"].is_cuda else "eager"  # a trial on the CPU need not be fast
    return torch.compile(call, dynamic=False, backend=backend)


def graphed(call: Call, given: dict) -> Call:
    """``call`` captured as a CUDA graph, for arguments of the shapes of ``given``."""
    fixed = tree_map(Tensor.clone, given)
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(3):
            call(**fixed)
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = call(**fixed)

    def replay(**new) -> Tensor:
        leaves = tree_leaves({name: new[name] for name in fixed})
        for old, leaf in zip(tree_leaves(fixed), leaves, strict=True):
            old.copy_(leaf)
        graph.replay()
        return output.clone()

    return replay


HOW: dict[str, Callable[[Call, dict], Call]] = {
    "eager": lambda call, given: call,
    "CUDA graph": graphed,
    "torch.compile": compiled,
}


@contextmanager
def in_place(unet: UNet2DConditionModel, call: Call, rows: int) -> Iterator[None]:
    """Calls of ``rows`` rows go through ``call`` while it lasts; others, as the unconditional half's, as ever."""
    plain = plain_call(unet)

    def forward(sample: Tensor, timestep: int, encoder_hidden_states: Tensor) -> UNet2DConditionOutput:
        time = torch.tensor(timestep, device=sample.device)
        chosen = call if len(sample) == rows else plain
        return UNet2DConditionOutput(chosen(sample=sample, timestep=time, encoder_hidden_states=encoder_hidden_states))

    unet.forward = forward
    try:
        yield
    finally:
        del unet.forward


def flops_of(call: Callable[[], object]) -> int:
    """Floating point operations of a call, products alone (a multiplication and addition are two).

    Attention is taken apart for it: of the fused kernels not all are counted.
    """
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()
