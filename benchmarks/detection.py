#!/usr/bin/env python
"""Prompts per second of anisotropy detection (n = 1), on one model, in one process:

(a) the plain loop of the public code: a prompt at a time, four guidance-doubled UNet calls each;
(b) this tool: the whole run, text encoding, unconditional predictions and writing included;
(c) the floor: bare UNet calls for the conditional halves alone, at the best of several batch sizes.

python benchmarks/detection.py                              the shipped testbed model
python benchmarks/detection.py --model random-sd14 --prompts 8
"""

from __future__ import annotations

import resource
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import pandas as pd
import torch
from diffusers import DDIMScheduler
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer
from transformers import logging as transformers_logging

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.denoisers import SD14  # noqa: E402
from local_sd_pipeline import LocalStableDiffusionPipeline  # noqa: E402
from memorization.detectors.base import make_detectors  # noqa: E402
from memorization.flags import ArgumentParser, run_script  # noqa: E402
from memorization.io.files import write_atomically  # noqa: E402
from memorization.io.prompts import read_prompts  # noqa: E402
from memorization.models.devices import DTYPES, pick_device, pick_dtype  # noqa: E402
from memorization.models.loading import load_pipeline  # noqa: E402
from memorization.models.spec import find_model  # noqa: E402
from memorization.runs.detect import run_detection  # noqa: E402
from memorization.runs.memory import default_batch_size  # noqa: E402
from memorization.runs.scorer import Scorer  # noqa: E402
from memorization.runs.store import ResultStore  # noqa: E402


def random_sd14(dtype: torch.dtype, device: torch.device) -> LocalStableDiffusionPipeline:
    """A pipeline of Stable Diffusion 1.4's true size with random weights."""
    tokenizer = CLIPTokenizer.from_pretrained(ROOT / "testbed/models/testbed-eps/tokenizer", model_max_length=77)
    text = CLIPTextConfig(
        vocab_size=49408, hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
        eos_token_id=tokenizer.eos_token_id, bos_token_id=tokenizer.bos_token_id, pad_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    pipe = LocalStableDiffusionPipeline(
        None, CLIPTextModel(text).eval(), tokenizer, SD14.make(device, dtype),
        DDIMScheduler(beta_schedule="scaled_linear"), None, None, requires_safety_checker=False,
    )  # fmt: skip
    return pipe.to(device, dtype)


def now(device: torch.device) -> float:
    """The clock, once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


@torch.inference_mode()
def plain_loop(pipe: LocalStableDiffusionPipeline, prompts: list[str]) -> float:
    """Seconds of (a)."""
    started = now(pipe.device)
    high, low = pipe.detection_timesteps()[0], pipe.detection_timesteps()[-3]
    for prompt in prompts:
        embeds = torch.cat([pipe.embed([""]), pipe.embed([prompt])])
        doubled = pipe.pure_noise(1, 51).repeat(2, 1, 1, 1)
        for timestep in (high, low, high, low):
            uncond, cond = pipe.predict_noise(doubled, timestep, embeds).chunk(2)
            (cond - uncond).norm().item()
    return now(pipe.device) - started


def this_tool(
    pipe: LocalStableDiffusionPipeline, prompts: list[str], batch_size: int, *, measure: bool = False
) -> tuple[float, int]:
    """Seconds of (b), and the batch size that memory allowed, or that was the fastest where it is measured."""
    started = now(pipe.device)
    detectors = make_detectors(["anisotropy", "noise_norm"], {})
    with tempfile.TemporaryDirectory() as folder, ResultStore(Path(folder) / "run", {}, {}) as store:
        make_scorer = partial(Scorer, pipe, detectors, noises=1, seed=51, steps=50)
        run_detection(make_scorer, pd.DataFrame({"prompt": prompts}), store, batch_size=batch_size, measure=measure)
        assert store.done == len(prompts)
    return now(pipe.device) - started, store.record.get("batch_size_used", batch_size)


@torch.inference_mode()
def floor(pipe: LocalStableDiffusionPipeline, prompts: list[str], batch_size: int) -> float:
    """Seconds of (c) at one batch size: two conditional rows a prompt, nothing else."""
    rows = 2 * len(prompts)
    latents = pipe.pure_noise(1, 51).to(pipe.unet.dtype).expand(rows, -1, -1, -1)
    embeds = pipe.embed(["a"]).expand(rows, -1, -1)
    pipe.unet(latents[:batch_size], 981, encoder_hidden_states=embeds[:batch_size])  # warm up
    started = now(pipe.device)
    for x, e in zip(latents.split(batch_size), embeds.split(batch_size), strict=True):
        pipe.unet(x, 981, encoder_hidden_states=e)
    return now(pipe.device) - started


def keep(path: Path, rows: list[dict]) -> None:
    """Write the rows of a model into a table, in place of those it had."""
    new = pd.DataFrame(rows)
    if path.is_file():
        old = pd.read_csv(path, dtype={"batch": "Int64"})
        new = pd.concat([old[old["model"] != new["model"][0]], new])
    write_atomically(path, new.to_csv(index=False))


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--model", default="testbed-eps", help="a model name, folder or hub id, or random-sd14 (default: %(default)s)")
    add("--prompts", type=int, default=128, metavar="N", help="how many (default: %(default)s)")
    add("--dtype", choices=list(DTYPES), help="default: bfloat16, as the public code, where the hardware has it")
    add("--device", default="auto")
    add("--batch-sizes", type=int, nargs="+", default=[2, 4, 8, 16, 32, 64], help="tried for (c)")
    add("--out", type=Path, metavar="FILE", help="keep the rows there, beside those of other models")
    args = parser.parse_args()
    transformers_logging.disable_progress_bar()
    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, device)
    if args.model == "random-sd14":
        pipe = random_sd14(DTYPES[dtype], device)
    else:
        pipe = load_pipeline(find_model(args.model), dtype, device)
    listed = read_prompts(ROOT / "prompts" / "testbed.csv")["prompt"].tolist()
    prompts = (listed * (args.prompts // len(listed) + 1))[: args.prompts]
    plain_loop(pipe, prompts[:1])  # warm up
    sizes = [size for size in args.batch_sizes if size <= 2 * args.prompts]
    floors = {size: floor(pipe, prompts, size) for size in sizes}
    best = min(floors, key=floors.get)
    tool, batch_size = this_tool(pipe, prompts, default_batch_size(pipe), measure=True)
    plain = plain_loop(pipe, prompts)
    lowest = min(floors[best], floor(pipe, prompts, best))  # once more, after the others, against drift
    print(f"{args.model}, {dtype}, {device}, {torch.get_num_threads()} threads, {len(prompts)} prompts, n = 1\n")
    measured = (
        ("(a)", "plain loop of the public code", plain, 2), ("(b)", "this tool", tool, batch_size),
        ("(c)", "bare UNet calls, conditional halves alone", lowest, best),
    )  # fmt: skip
    print("| | prompts/s | s/prompt | batch |\n|---|---|---|---|")
    for letter, name, seconds, size in measured:
        print(f"| {letter} {name} | {len(prompts) / seconds:.2f} | {seconds / len(prompts):.4f} | {size} |")
    if args.out:
        keep(args.out, [
            {"model": args.model, "dtype": dtype, "prompts": len(prompts), "what": name,
             "seconds a prompt": float(f"{seconds / len(prompts):.3g}"), "batch": size}
            for _, name, seconds, size in measured
        ])  # fmt: skip
    print(f"\n(b) / (a) = {plain / tool:.2f}    (b) / (c) = {lowest / tool:.2f}")
    print("(c) by batch size, s/prompt: " + ", ".join(f"{k}: {v / len(prompts):.4f}" for k, v in floors.items()))
    print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB")


if __name__ == "__main__":
    run_script(main)
