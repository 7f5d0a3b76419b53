"""One training loop for every stage: seeded by step, logged, resumable; on CUDA replayed as one graph a step."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

EMA_DECAY = 0.999
Batch = Sequence[Tensor]


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over the first 4% of the steps, then a cosine to 1% of the peak."""
    warm = max(1, steps // 25)
    if step < warm:
        return peak * (step + 1) / warm
    return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (step - warm) / (steps - warm))))


class Training:
    """A model, the moving average of its weights, and its optimiser.

    Args:
        loss_of: the loss of a batch; it draws nothing at random.
    """

    def __init__(self, model: nn.Module, loss_of: Callable[..., Tensor], peak: float) -> None:
        self.names, self.parameters = zip(*model.named_parameters(), strict=True)
        self.average = [p.detach().clone() for p in self.parameters]
        self.cuda = self.parameters[0].is_cuda
        self.rate = torch.tensor(peak, device=self.parameters[0].device)
        self.optimizer = torch.optim.AdamW(self.parameters, lr=self.rate, fused=True, capturable=self.cuda)
        self.loss_of = loss_of
        self.graph: torch.cuda.CUDAGraph | None = None

    def _update(self, batch: Batch) -> Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.loss_of(*batch)
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        return loss.detach()

    def update(self, batch: Batch, step: int, rate: float, *, capture: bool) -> Tensor:
        """One step; its loss. ``capture``: on CUDA, record it as a graph and replay that from then on."""
        self.rate.fill_(rate)
        if capture and self.graph is None and self.cuda:
            self._capture(batch)
        if self.graph is None:
            loss = self._update(batch)
        else:
            for ours, given in zip(self.batch, batch, strict=True):
                ours.copy_(given)
            self.graph.replay()
            loss = self.loss
        kept = min(EMA_DECAY, (1 + step) / (10 + step))
        torch._foreach_lerp_(self.average, [p.detach() for p in self.parameters], 1 - kept)
        return loss

    def _capture(self, batch: Batch) -> None:
        self.batch = [given.clone() for given in batch]
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.cuda.graph(self.graph):
            self.loss = self._update(self.batch)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the weights and their average."""
        for parameter, mean in zip(self.parameters, self.average, strict=True):
            kept = parameter.clone()
            parameter.copy_(mean)
            mean.copy_(kept)

    def save(self, path: Path, step: int, recipe: str) -> None:
        """Weights, average and optimiser, replaced at once."""
        state = {}
        for name, parameter, mean in zip(self.names, self.parameters, self.average, strict=True):
            moments = self.optimizer.state[parameter]
            state |= {f"weight/{name}": parameter.detach(), f"average/{name}": mean,
                      f"first/{name}": moments["exp_avg"], f"second/{name}": moments["exp_avg_sq"]}  # fmt: skip
        state = {key: value.contiguous() for key, value in state.items()}
        save_file(state, path.with_suffix(".new"), metadata={"step": str(step), "recipe": recipe})
        path.with_suffix(".new").replace(path)

    def load(self, path: Path, recipe: str) -> int:
        """The step a saved state has reached; 0 where there is none."""
        if not path.exists():
            return 0
        with safe_open(path, "pt") as state, torch.no_grad():
            if state.metadata()["recipe"] != recipe:
                raise SystemExit(f"{path} holds training by another recipe; move it away to train anew")
            step = int(state.metadata()["step"])
            for name, parameter, mean in zip(self.names, self.parameters, self.average, strict=True):
                parameter.copy_(state.get_tensor(f"weight/{name}"))
                mean.copy_(state.get_tensor(f"average/{name}"))
                moments = {key: torch.empty_like(parameter).copy_(state.get_tensor(f"{place}/{name}"))
                           for key, place in (("exp_avg", "first"), ("exp_avg_sq", "second"))}  # fmt: skip
                count = torch.tensor(float(step), device=parameter.device if self.cuda else "cpu")
                self.optimizer.state[parameter] = {"step": count, **moments}
        return step


def fit(
    model: nn.Module,
    batch_of: Callable[[int], Batch],
    loss_of: Callable[..., Tensor],
    *,
    steps: int,
    peak: float,
    folder: Path,
    recipe: str,
    watch: Callable[[nn.Module], dict] | None = None,
    watch_every: int = 1000,
    save_every: int = 500,
    capture: bool = True,
) -> None:
    """Train ``model`` in place with AdamW; at the end it holds the moving average of its weights.

    Args:
        batch_of: the batch of a step, given its number; everything random is drawn there, from a generator seeded by
            that number, so that a resumed run sees the batches an uninterrupted one would have seen.
        loss_of: the loss of such a batch.
        folder: holds ``state.safetensors`` and ``log.jsonl``.
        recipe: what else the weights depend on; a state made by another one is refused.
        watch: numbers to log of the averaged model every ``watch_every`` steps, before a state of that step is saved: a
            run killed between the two watches again.
        capture: whether a step may be replayed as a CUDA graph: not where the model asks the host.
    """
    folder.mkdir(parents=True, exist_ok=True)
    training = Training(model, loss_of, peak)
    first = training.load(folder / "state.safetensors", recipe)
    started, smooth = time.time(), None
    model.train()
    for step in tqdm(range(first, steps), initial=first, total=steps, desc=folder.name, mininterval=5):
        loss = training.update(
            batch_of(step), step, learning_rate(step, steps, peak), capture=capture and step >= first + 5
        )
        done = step + 1
        if done % 50 == 0:
            value = loss.item()
            smooth = value if smooth is None else 0.8 * smooth + 0.2 * value
            _log(folder, {"step": done, "loss": round(smooth, 5), "seconds": round(time.time() - started, 1)})
        if watch and (done % watch_every == 0 or done == steps):
            training.swap()
            _log(folder, {"step": done, **watch(model.eval())})
            training.swap()
            model.train()
        if done % save_every == 0 or done == steps:
            training.save(folder / "state.safetensors", done, recipe)
    training.swap()
    model.eval()


def _log(folder: Path, row: dict) -> None:
    with open(folder / "log.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
