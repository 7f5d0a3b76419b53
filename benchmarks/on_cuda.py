#!/usr/bin/env python
"""Tests, scores and speed on one CUDA card, into one JSON file, in under 8 minutes and without network.

bash benchmarks/on_cuda.sh              results/speed/cuda-<card>.json, and its tables on standard output
bash benchmarks/on_cuda.sh --smoke      the same way on the CPU with tiny networks, in under a minute

Three parts: the tests marked cuda; the scores of both shipped testbeds in float32, bfloat16 and float16 against those
of the CPU in float32; and the speed of random networks of true size, in bfloat16 and float16. The file is replaced with
each new row, so that a killed run keeps what it has, and the same command goes on where it ended.
"""

from __future__ import annotations

import math
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial
from importlib.metadata import version
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import torch
from accelerate.utils.memory import clear_device_cache
from diffusers.utils import logging as diffusers_logging
from scipy.stats import spearmanr
from sklearn.metrics import roc_auc_score
from torch import nn
from torch.utils.benchmark import Timer
from transformers import logging as transformers_logging

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import memorization as mem  # noqa: E402
from benchmarks.denoisers import FLUX, HOW, PEAK, SD3, SD14, SDXL, Call, Denoiser, flops_of, in_place, plain_call  # noqa: E402
from benchmarks.detection import now, plain_loop, random_sd14, this_tool  # noqa: E402
from benchmarks.figures import BARE, NETWORKS, PLAIN, SCORES, TOOL, Figures, score_rows, speed_rows  # noqa: E402
from local_sd_pipeline import LocalStableDiffusionPipeline  # noqa: E402
from memorization.errors import InputError  # noqa: E402
from memorization.flags import ArgumentParser, add_flags, run_script, value  # noqa: E402
from memorization.io.prompts import read_prompts  # noqa: E402
from memorization.io.tables import markdown  # noqa: E402
from memorization.models.devices import DTYPES  # noqa: E402
from memorization.models.loading import load_pipeline  # noqa: E402
from memorization.models.spec import find_model  # noqa: E402
from memorization.runs.store import PACKAGES  # noqa: E402
from memorization.settings import Positive  # noqa: E402

TESTBEDS = ("testbed-eps", "testbed-v")
TINY = {  # what differs from the true size
    "SD 1.4": replace(SD14, side=16),
    "SDXL": replace(SDXL, side=16, words=8, config=SDXL.config | {
        "block_out_channels": (8, 8, 16), "norm_num_groups": 4, "attention_head_dim": (2, 2, 4), "sample_size": 16,
        "transformer_layers_per_block": 1, "layers_per_block": 1, "cross_attention_dim": 16,
        "addition_time_embed_dim": 4, "projection_class_embeddings_input_dim": 6 * 4 + 16}),
    "SD 3": replace(SD3, side=16, words=8, config={
        "sample_size": 16, "num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 8, "pos_embed_max_size": 8,
        "caption_projection_dim": 16, "joint_attention_dim": 16, "pooled_projection_dim": 16}),
    "Flux.1": replace(FLUX, side=16, words=8, config={
        "num_layers": 1, "num_single_layers": 1, "num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 16,
        "joint_attention_dim": 16, "pooled_projection_dim": 16, "axes_dims_rope": (2, 2, 4), "guidance_embeds": True}),
}  # fmt: skip


@dataclass(frozen=True)
class Sizes:
    """How much is measured.

    Attributes:
        listed: prompts of each testbed, half of them memorized.
        dtypes: that speed is measured in.
        looped: prompts of the plain loop; batched: of this tool, a multiple of its batches.
        batches: network -> rows to a call; for the scored one these are this tool's batches too.
        repeated: seconds that a call is repeated for.
        compiling: seconds that must be left for torch.compile.
    """

    networks: dict[str, Denoiser]
    dtypes: Sequence[str]
    listed: int
    looped: int
    batched: int
    batches: dict[str, Sequence[int]]
    repeated: float
    compiling: float


FULL = Sizes(
    dict(zip(NETWORKS, (SD14, SDXL, SD3, FLUX), strict=True)), ("bfloat16", "float16"),
    listed=200, looped=16, batched=128, repeated=0.4, compiling=100,
    batches={"SD 1.4": (1, 8, 32, 64), "SDXL": (1, 4, 16), "SD 3": (1, 4, 16), "Flux.1": (1, 2, 4)},
)  # fmt: skip
SMOKE = Sizes(
    TINY, ("bfloat16",), listed=4, looped=1, batched=4, repeated=0.001, compiling=1, batches=dict.fromkeys(TINY, (2,))
)


# ---------------------------------------------------------------- tests
def run_tests() -> dict:
    """The tests marked cuda, in a process of their own: how each ended.

    Files without any are not imported: that would take longer than the tests.
    """
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-m", "cuda", f"--junitxml={report}", "tests/test_cuda.py"]
        ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=180)
        if not report.exists():
            raise RuntimeError(f"pytest did not run: {(ended.stderr or ended.stdout)[-150:]}")
        cases = ElementTree.parse(report).iter("testcase")
    outcomes = {case.get("name", ""): _outcome(case) for case in cases}
    if failed := [name for name, outcome in outcomes.items() if outcome in ("failure", "error")]:
        print(ended.stdout, file=sys.stderr)
    return {"failed": failed, "tests": outcomes}


def _outcome(case: ElementTree.Element) -> str:
    kinds = {child.tag for child in case} & {"failure", "error", "skipped"}
    return kinds.pop() if kinds else "passed"


# ---------------------------------------------------------------- scores
def measure_scores(figures: Figures, device: torch.device, count: int) -> None:
    """Scores on the device in three dtypes against those of the CPU in float32."""
    for name in TESTBEDS:
        listed = read_prompts(ROOT / find_model(name).lists()["prompts"])
        listed = listed.groupby("label").sample(count // 2, random_state=0)
        expected = cache(partial(scores_of, name, "cpu", "float32", listed))

        for dtype in DTYPES:
            found = partial(scores_of, name, str(device), dtype, listed)
            figures.measure(
                {"part": "scores", "model": name, "dtype": dtype},
                lambda found=found, expected=expected, listed=listed: compare(expected(), found(), listed["label"]),
                seconds=20,
            )


def scores_of(name: str, device: str, dtype: str, listed: pd.DataFrame) -> dict[str, np.ndarray]:
    """Score -> its values ``(prompts,)`` at one noise."""
    frame = mem.score(mem.load(name, device=device, dtype=dtype), listed, detectors=["anisotropy"])
    return {score: np.array(frame[score].tolist())[:, 0] for score in SCORES}


def compare(expected: dict[str, np.ndarray], found: dict[str, np.ndarray], labels: pd.Series) -> dict:
    """How far scores are from the expected ones, each relative to itself and to how they spread."""
    row: dict = {"prompts": len(labels)}
    for score, cpu in expected.items():
        away, auc = np.abs(found[score] - cpu), roc_auc_score(labels, cpu)
        row[score] = {
            "largest relative difference": float((away / np.abs(cpu)).max()),
            "largest difference / spread": float(away.max() / cpu.std()),
            "Spearman": float(spearmanr(cpu, found[score]).statistic),
            "AUC on the CPU": float(auc),
            "AUC difference": float(roc_auc_score(labels, found[score]) - auc),
        }
    return row


# ---------------------------------------------------------------- speed
class Network:
    """One network on one device, made when it is first needed, and how fast it is."""

    def __init__(self, name: str, device: torch.device, sizes: Sizes) -> None:
        self.name, self.device, self.sizes = name, device, sizes
        self.denoiser = sizes.networks[name]
        self._fast: tuple[tuple, Call | None] = (), None

    @cached_property
    def pipe(self) -> LocalStableDiffusionPipeline:
        """Of the network that the tool scores."""
        if self.sizes is SMOKE:
            tiny = find_model(str(ROOT / "tests" / "golden" / "tiny-eps"))
            return load_pipeline(tiny, "bfloat16", self.device)
        return random_sd14(torch.bfloat16, self.device)

    @cached_property
    def module(self) -> nn.Module:
        """The denoiser."""
        if self.name == NETWORKS[0]:
            return self.pipe.unet
        return self.denoiser.make(self.device, torch.bfloat16)

    @cached_property
    def flops(self) -> int:
        """Of a row."""
        found = flops_of(partial(plain_call(self.module), **self.denoiser.inputs(self.module, 1)))
        clear_device_cache()  # counting takes more memory than a call
        return found

    def fast(self, dtype: str, rows: int, how: str) -> Call:
        """The denoiser's call in a way of :data:`HOW`; the last one is kept, for it may have cost a minute."""
        if self._fast[0] != (dtype, rows, how):
            self._fast = (), None  # its memory first
            given = self.denoiser.inputs(self.module.to(DTYPES[dtype]), rows)
            self._fast = (dtype, rows, how), HOW[how](plain_call(self.module), given)
        return self._fast[1]

    def timed(self, rows: int, work: Callable[[], float]) -> dict:
        """Speed and memory of work that takes so many rows through the denoiser and gives its seconds.

        The memory is what torch reserves: of a CUDA graph nothing else counts what lies in its pool.
        """
        flops = self.flops * rows  # before the rest, for its memory
        cuda, peak, memory = self.device.type == "cuda", None, None
        if cuda:
            torch.cuda.reset_peak_memory_stats()
            peak = PEAK.get(torch.cuda.get_device_name())
        rate = flops / (seconds := work()) / 1e12
        if cuda:
            memory = torch.cuda.max_memory_reserved() / 2**30
        return {"seconds a row": seconds / rows, "TFLOP/s": rate, "share of peak": rate / peak if peak else None,
                "peak memory, GiB": memory, "GFLOP a row": self.flops / 1e9}  # fmt: skip

    def bare(self, dtype: str, rows: int, how: str) -> dict:
        """Calls of the denoiser alone, what it took to prepare the first, and how far its output is from eager."""
        module, started = self.module.to(DTYPES[dtype]), now(self.device)
        given = self.denoiser.inputs(module, rows)
        call = self.fast(dtype, rows, how)
        found = call(**given)
        prepared, expected = now(self.device) - started, plain_call(module)(**given).float()
        away = ((found.float() - expected).norm() / expected.norm()).item()
        clear_device_cache()  # of the eager call
        timer = Timer("call(**given)", globals={"call": call, "given": given}, num_threads=torch.get_num_threads())
        timed = self.timed(rows, lambda: timer.blocked_autorange(min_run_time=self.sizes.repeated).median)
        return {**timed, "seconds to prepare": prepared, "relative difference": away if math.isfinite(away) else None,
                "parameters": sum(weights.numel() for weights in module.parameters())}  # fmt: skip

    def loop(self, dtype: str) -> dict:
        """The plain loop: four calls of two rows a prompt."""
        pipe, prompts = self.pipe.to(DTYPES[dtype]), prompts_of(self.sizes.looped)
        plain_loop(pipe, prompts[:1])  # warm up
        timed = self.timed(8 * len(prompts), lambda: plain_loop(pipe, prompts))
        return {**timed, "seconds a prompt": 8 * timed["seconds a row"]}

    def tool(self, dtype: str, rows: int, how: str) -> dict:
        """This tool: two rows a prompt, and two of the unconditional half.

        Raises:
            OutOfMemoryError: memory halved the batch, so that no call went through the one that was prepared.
        """
        pipe, prompts = self.pipe.to(DTYPES[dtype]), prompts_of(self.sizes.batched)
        done = 2 * len(prompts) + 2
        with in_place(pipe.unet, self.fast(dtype, rows, how), rows):
            this_tool(pipe, prompts[:rows], rows)  # warm up
            runs = []
            timed = self.timed(done, lambda: runs.append(this_tool(pipe, prompts, rows)) or runs[0][0])
        used = runs[0][1]
        if used != rows and how != "eager":
            raise torch.OutOfMemoryError(f"only {used} rows fit, which went eagerly")
        return {**timed, "seconds a prompt": timed["seconds a row"] * done / len(prompts), "batch used": used}


@cache
def prompts_of(count: int) -> list[str]:
    """So many, from the shipped list."""
    listed = read_prompts(ROOT / "prompts" / "testbed.csv")["prompt"].tolist()
    return (listed * (count // len(listed) + 1))[:count]


def measure_speed(figures: Figures, device: torch.device, sizes: Sizes) -> None:
    """All networks; what takes long to prepare comes last."""
    ways = ("eager", "CUDA graph") if device.type == "cuda" else ("eager",)
    for name in NETWORKS:
        measure_network(figures, Network(name, device, sizes), ways, sizes.batches[name])
    scored = NETWORKS[0]
    measure_network(figures, Network(scored, device, sizes), ("torch.compile",), sizes.batches[scored][-1:])


def measure_network(figures: Figures, network: Network, ways: Sequence[str], batches: Sequence[int]) -> None:
    """A network in both half precisions: bare calls, and of the scored one the plain loop and this tool."""
    scored = network.name == NETWORKS[0]
    clear_device_cache(garbage_collection=True)  # of the network before
    for dtype in network.sizes.dtypes:
        common = {"part": "speed", "network": network.name, "dtype": dtype}
        if scored:
            figures.measure({**common, "what": PLAIN, "how": "eager", "batch": 2}, partial(network.loop, dtype))
        for rows in batches:
            for how in ways:
                way, seconds = {"how": how, "batch": rows}, network.sizes.compiling if how == "torch.compile" else 5
                figures.measure({**common, "what": BARE, **way}, partial(network.bare, dtype, rows, how), seconds)
                if scored:  # by the call that was prepared
                    figures.measure({**common, "what": TOOL, **way}, partial(network.tool, dtype, rows, how))
                clear_device_cache(garbage_collection=True)
    torch.compiler.reset()


# ---------------------------------------------------------------- all
def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="on the CPU with tiny networks, always anew")
    parser.add_argument("--minutes", type=value(Positive), default=7.0, metavar="N",
                        help="nothing is begun that would take longer (default: %(default)s)")  # fmt: skip
    add_flags(parser, "--out", metavar="FILE", help="default: results/speed/cuda-<card>.json")
    add_flags(parser, "--overwrite", help="forget what the file holds")
    args = parser.parse_args()
    if not args.smoke and not torch.cuda.is_available():
        raise InputError("no CUDA card here; --smoke goes the same way on the CPU, with tiny networks")
    device, sizes = (torch.device("cpu"), SMOKE) if args.smoke else (torch.device("cuda"), FULL)
    card = "CPU" if args.smoke else torch.cuda.get_device_name()
    slug = re.sub(r"\W+", "-", card.lower())
    out = args.out or ROOT / "results" / ("local/cuda-smoke.json" if args.smoke else f"speed/cuda-{slug}.json")
    about = {"card": card, "smoke": args.smoke, "versions": {name: version(name) for name in PACKAGES}}
    figures = Figures(out, about, 60 * args.minutes, args.overwrite or args.smoke)
    figures.measure({"part": "tests"}, run_tests)
    with torch.no_grad():
        measure_scores(figures, device, sizes.listed)
        measure_speed(figures, device, sizes)
    report(figures)


def report(figures: Figures) -> None:
    """The tables; exit status 1 where something failed."""
    for rows in (score_rows(figures.rows), speed_rows(figures.rows)):
        print(markdown(pd.DataFrame(rows)) + "\n" if rows else "")
    if figures.left:
        print(f"no time was left for {len(figures.left)} rows: the same command goes on", file=sys.stderr)
    for row in figures.failed:
        print(f"failed: {row}", file=sys.stderr)
    if figures.failed:
        sys.exit(1)


if __name__ == "__main__":
    for logging in (diffusers_logging, transformers_logging):
        logging.set_verbosity_error()
        logging.disable_progress_bar()
    run_script(main)
