"""One training loop for every stage: seeded by step, logged, resumable to the same numbers."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

EMA_DECAY = 0.999
SAVE_EVERY = 200


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over the first 4% of the steps, then a cosine to 1% of the peak."""
    warm = max(1, steps // 25)
    if step < warm:
        return peak * (step + 1) / warm
    return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (step - warm) / (steps - warm))))


def fit(
    model: nn.Module,
    loss_of: Callable[[int], Tensor],
    *,
    steps: int,
    peak: float,
    folder: Path,
    watch: Callable[[nn.Module], dict[str, float]] | None = None,
    watch_every: int = 1000,
    recipe: str = "",
) -> None:
    """Train ``model`` in place with AdamW; at the end it holds the moving average of its weights.

    Args:
        loss_of: the loss of a step, given its number. It draws its batch from a generator seeded by that number, so
            that a resumed run sees the batches an uninterrupted one would have seen.
        folder: holds ``state.safetensors`` (weights, average, optimiser) and ``log.csv``.
        recipe: what else the weights depend on; a state made by another one is refused.
        watch: numbers to log of the averaged model every ``watch_every`` steps.
    """
    folder.mkdir(parents=True, exist_ok=True)
    names, parameters = zip(*model.named_parameters(), strict=True)
    optimizer = torch.optim.AdamW(parameters, lr=peak, fused=True)
    average = [p.detach().clone() for p in parameters]
    first = _load(folder, recipe, names, parameters, average, optimizer)
    model.train()
    started, smooth = time.time(), None
    for step in tqdm(range(first, steps), initial=first, total=steps, desc=folder.name, mininterval=5):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, peak)
        loss = loss_of(step)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        torch._foreach_lerp_(average, [p.detach() for p in parameters], 1 - min(EMA_DECAY, (1 + step) / (10 + step)))
        smooth = loss.item() if smooth is None else 0.98 * smooth + 0.02 * loss.item()
        done = step + 1
        if done % 50 == 0:
            _log(folder, {"step": done, "loss": round(smooth, 5), "seconds": round(time.time() - started, 1)})
        if done % SAVE_EVERY == 0 or done == steps:
            _save(folder, recipe, done, names, parameters, average, optimizer)
        if watch and (done % watch_every == 0 or done == steps):
            trained = [p.detach().clone() for p in parameters]
            _assign(parameters, average)
            _log(folder, {"step": done, **watch(model.eval())})
            _assign(parameters, trained)
            model.train()
    _assign(parameters, average)
    model.eval()


def _assign(parameters, values) -> None:
    with torch.no_grad():
        torch._foreach_copy_(list(parameters), list(values))


def _log(folder: Path, row: dict) -> None:
    with open(folder / "log.csv", "a", encoding="utf-8") as file:
        file.write(",".join(f"{key}={value}" for key, value in row.items()) + "\n")


def _save(folder, recipe, step, names, parameters, average, optimizer) -> None:
    state = {}
    for name, parameter, mean in zip(names, parameters, average, strict=True):
        moments = optimizer.state[parameter]
        state |= {
            f"weight/{name}": parameter.detach(),
            f"average/{name}": mean,
            f"first/{name}": moments["exp_avg"],
            f"second/{name}": moments["exp_avg_sq"],
        }
    state = {key: value.contiguous() for key, value in state.items()}
    save_file(state, folder / "state.new", metadata={"step": str(step), "recipe": recipe})
    (folder / "state.new").replace(folder / "state.safetensors")


def _load(folder, recipe, names, parameters, average, optimizer) -> int:
    path = folder / "state.safetensors"
    if not path.exists():
        return 0
    with safe_open(path, "pt") as state, torch.no_grad():
        if state.metadata()["recipe"] != recipe:
            raise SystemExit(f"{folder} holds training by another recipe; move it away to train anew")
        step = int(state.metadata()["step"])
        for name, parameter, mean in zip(names, parameters, average, strict=True):
            parameter.copy_(state.get_tensor(f"weight/{name}"))
            mean.copy_(state.get_tensor(f"average/{name}"))
            optimizer.state[parameter] = {
                "step": torch.tensor(float(step)),
                "exp_avg": torch.empty_like(parameter).copy_(state.get_tensor(f"first/{name}")),
                "exp_avg_sq": torch.empty_like(parameter).copy_(state.get_tensor(f"second/{name}")),
            }
    return step
