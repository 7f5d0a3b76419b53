"""Thresholds from ordinary prompts, in a small file that holds for one way of drawing alone."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import yaml
from torch import nn

from memorization.errors import InputError
from memorization.evaluation.calibration import levels_of
from memorization.evaluation.intervals import share_interval
from memorization.evaluation.metrics import threshold_at
from memorization.io.files import read_file, write_atomically
from memorization.models.families.base import Family
from memorization.settings import Checked, Count, NotNegative, Place, Rate, make

ENTRIES = 16  # of every weight that tell a network from others


class Threshold(NamedTuple):
    """A score from which on a picture is flagged.

    Attributes:
        source: where it comes from, in words.
    """

    value: float
    source: str


@dataclass(frozen=True)
class Conditions(Checked):
    """What a threshold holds for.

    Attributes:
        weights: tells the denoiser from others; adapters such as LoRAs that lie beside its own weights do not count.
        scheduler: its class, and a digest of its settings.
        timesteps: of the steps whose score is read.
        size: of a picture's latents, ``(c, h, w)``.
    """

    weights: str
    dtype: str
    scheduler: str
    guidance_scale: float
    timesteps: tuple[float, ...]
    size: tuple[Count, ...]


@dataclass(frozen=True)
class Thresholds(Checked):
    """What a file of thresholds holds.

    Attributes:
        model: its name, for people.
        holds_for: see :class:`Conditions`.
        fpr: share of ordinary pictures that may be flagged, where nothing else is asked for.
        left_out: prompts that are near-copies of others, and were left out.
        scores: of ordinary prompts, one noise each, highest first.
    """

    model: str
    holds_for: dict[str, Any]
    fpr: Rate
    scores: tuple[NotNegative, ...]
    left_out: Place = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "scores", tuple(sorted(self.scores, reverse=True)))
        object.__setattr__(self, "holds_for", asdict(self.conditions))
        self.at(self.fpr)

    @property
    def conditions(self) -> Conditions:
        """What it holds for."""
        return make(Conditions, self.holds_for, "holds_for")

    def rates(self, fpr: float) -> tuple[float, float, float, float]:
        """(threshold, share of the ordinary prompts at or above it, and that rate's 95% interval for new ones)."""
        scores = np.array(self.scores)
        value, realised = threshold_at(np.zeros(len(scores)), scores, fpr)
        return (float(f"{value:.6g}"), *share_interval(round(realised * len(scores)), len(scores)))

    def at(self, fpr: float) -> Threshold:
        """The threshold of a rate of false alarms.

        Raises:
            InputError: there are too few prompts for so low a rate.
        """
        if fpr * len(self.scores) < 1 - 1e-9:
            needed = int(np.ceil(1 / fpr - 1e-9))
            raise InputError(f"a rate of {fpr:g} needs {needed} ordinary prompts, here are {len(self.scores)}")
        value, realised, low, high = self.rates(fpr)
        return Threshold(
            value, f"{realised:.2%} [{low:.2%}, {high:.2%}] of {len(self.scores)} ordinary prompts reach it"
        )

    @property
    def levels(self) -> dict[float, float]:
        """Share of the ordinary prompts -> score below which it lies."""
        return levels_of(np.array(self.scores))

    def save(self, path: str | Path) -> None:
        """Write the file, whole or not at all."""
        content = json.loads(json.dumps(asdict(self)))  # tuples as lists
        write_atomically(Path(path), yaml.safe_dump(content, sort_keys=False, default_flow_style=None))


def read_thresholds(path: Path) -> Thresholds:
    """Read a file of thresholds.

    Raises:
        InputError: it is none, or a field is not what it should be.
    """
    try:
        content = yaml.safe_load(read_file(path).decode())
    except (yaml.YAMLError, ValueError, RecursionError):
        content = None
    if not isinstance(content, dict) or "holds_for" not in content:
        raise InputError(f"{path}: no file of thresholds; memorization calibrate writes them")
    return make(Thresholds, content, str(path))


def check(known: Conditions, here: Mapping[str, Any], where: str) -> None:
    """See that thresholds hold for what is ``here``.

    Raises:
        InputError: they are for something else.
    """
    for key, value in here.items():
        if (meant := getattr(known, key)) != value:
            raise InputError(f"{where} is for {key} = {meant}, here is {value}; calibrate anew")


def fixed_conditions(pipe: Any, family: Family) -> dict[str, Any]:
    """What of :class:`Conditions` is known before a picture is drawn."""
    network = family.denoiser(pipe)
    return {
        "dtype": str(network.dtype).removeprefix("torch."),
        "scheduler": scheduler_of(pipe.scheduler),
        "weights": weights_of(network),
    }


def scheduler_of(scheduler: Any) -> str:
    """Its class, and a digest of its settings."""
    settings = {key: value for key, value in scheduler.config.items() if not key.startswith("_")}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()
    return f"{type(scheduler).__name__} {digest[:12]}"


@torch.no_grad()
def weights_of(network: nn.Module) -> str:
    """A digest of some entries of every weight but those of adapters.

    Raises:
        InputError: the weights are not at hand, as under sequential offload.
    """
    digest = hashlib.sha256()
    for name, weight in sorted(network.state_dict().items()):
        if "lora_" in name:
            continue
        if weight.is_meta:
            raise InputError("the denoiser's weights are not at hand: protect the pipeline before it is offloaded")
        # The first entries along the last axis: nothing large is copied, whatever the memory's layout.
        entries = weight[(0,) * (weight.dim() - 1)][:ENTRIES] if weight.dim() else weight
        digest.update(_plain(name).encode())
        digest.update(np.ascontiguousarray(entries.float().cpu().numpy()).tobytes())
    return digest.hexdigest()[:16]


def _plain(name: str) -> str:
    """A weight's name as it is without adapters and compilation."""
    return name.removeprefix("_orig_mod.").replace(".base_layer.", ".")
