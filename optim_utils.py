"""Gradient descent on prompt embeddings or latents against any differentiable score.

Detectors that need a prompt are differentiable functions of a trace, and the predictions of the pipeline are
differentiable in embeddings and latents, so one descent serves every mitigation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm


class Descent(NamedTuple):
    """What a descent found.

    Attributes:
        best: the iterate of lowest loss of every row, ``(rows, ...)``; the first below the target where there is one.
        losses: ``(iterations + 1, rows)``, the start first; NaN once a row has stopped.
        steps: how many steps each row took, ``(rows,)``.
    """

    best: Tensor
    losses: Tensor
    steps: Tensor


def descend(
    loss_of: Callable[[Tensor, Tensor], Tensor],
    start: Tensor,
    *,
    lr: float = 0.05,
    iterations: int = 10,
    target: float | Tensor | None = None,
    free: Tensor | None = None,
    progress: bool = True,
) -> Descent:
    """Adam on every row of ``start`` at once; rows do not see one another.

    Wen et al. use AdamW; its decay pulls embeddings to zero for no reason of the method's, so there is none here.

    Args:
        loss_of: ``(iterates (k, ...), rows (k,)) -> losses (k,)``, the rows that are still moving and their numbers.
        start: ``(rows, ...)``.
        target: a row stops once its loss is at or below it.
        free: what may move, broadcast over ``start``; ones and zeros.
    """
    moving = start.detach().float().clone().requires_grad_()
    optimizer = torch.optim.Adam([moving], lr=lr)
    best, lowest = start.detach().float().clone(), torch.full((len(start),), torch.inf, device=start.device)
    active = torch.ones(len(start), dtype=torch.bool, device=start.device)
    steps, losses = torch.zeros(len(start), dtype=torch.long, device=start.device), []
    for step in tqdm(range(iterations + 1), desc="descent", disable=not progress, leave=False):
        rows = active.nonzero()[:, 0]
        with torch.enable_grad():
            loss = loss_of(moving[rows], rows)
            if step < iterations:
                (gradient,) = torch.autograd.grad(loss.sum(), moving)
        seen = torch.full_like(lowest, torch.nan).index_put((rows,), loss.detach().float())
        losses.append(seen)
        better = active & (seen < lowest)
        best[better], lowest[better] = moving.detach()[better], seen[better]
        if target is not None:
            active = active & ~(seen <= target)
        if step == iterations or not active.any():
            break
        still = active.view(-1, *[1] * (moving.dim() - 1))
        moving.grad = torch.where(still, gradient if free is None else gradient * free, 0.0)
        held = moving.detach().clone()
        optimizer.step()
        with torch.no_grad():  # Adam moves by its memory even where the gradient is 0
            moving.copy_(torch.where(still, moving if free is None else torch.where(free.bool(), moving, held), held))
        steps += active
    return Descent(best, torch.stack(losses), steps)


def all_but_the_start_token(embeds: Tensor) -> Tensor:
    """``free`` for prompt embeddings ``(rows, tokens, width)``: the start token stays as it is, as in Wen et al."""
    free = torch.ones_like(embeds[:1])
    free[:, 0] = 0
    return free
